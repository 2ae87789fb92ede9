"""Step time against bandwidth: ``python -m benchmarks.network``. Linux, as root.

The suite of ``python -m benchmarks`` over hosts whose network has a rate and a delay (`benchmarks.hosts`): in each
round all peers are visited at each bandwidth. On one machine without such a network communication is a copy, and what
a row sends hardly shows. It shows here: the seconds of a step that the network adds are the bytes it carries over its
rate, less what is hidden behind computation.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import environment
from benchmarks.chart import FAMILY_COLOURS
from benchmarks.config import Config
from benchmarks.crew import RankFailed
from benchmarks.hosts import Hosts
from benchmarks.models import MODELS
from benchmarks.peers import PEERS, choose
from benchmarks.progress import progress
from benchmarks.render import MIB
from benchmarks.result import PeerResult
from benchmarks.runner import Runner
from benchmarks.stats import ratios

matplotlib.use("Agg")  # draws to files, on machines without a screen too

DEFAULT_PEERS = (
    "single",
    *("torch_ddp", "torch_zero", "torch_fsdp2", "torch_fsdp2_partial"),
    *("accel_ddp", "accel_zero1", "accel_zero2", "accel_fsdp", "accel_fsdp_partial"),
)
UNLIMITED = "unlimited"
_MARKS = "os^vDPX*<>"
EXAMPLES = """
examples:
  python -m benchmarks.network                                          2 hosts, 300 Mbit/s to as fast as it goes
  python -m benchmarks.network --hosts 2 --ranks 4 --peers torch_fsdp2,accel_fsdp_hybrid
                                                                        two ranks on each host
  python -m benchmarks.network --mbit 1000 --delay-ms 5                 a distant host; needs a kernel with netem
"""

Rate = float | str
"""Mbit/s, or "unlimited"."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write table, records and chart; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.peers.split(",") if name.strip()]
    try:
        specs = choose(names)
    except ValueError as error:
        parser.error(str(error))
    if options.ranks % options.hosts or options.ranks < options.hosts:
        parser.error(f"expected as many ranks on each host, got {options.ranks} ranks and {options.hosts} hosts")
    config = Config(model=options.model, ranks=options.ranks, rounds=options.rounds, steps=options.steps, saves=0)
    obstacles = {spec.name: spec.obstacle(config) for spec in specs}
    able = [spec for spec in specs if obstacles[spec.name] is None]
    if not able:
        parser.error("; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items()))
    rates: list[Rate] = sorted(options.mbit) + [UNLIMITED] * (not options.no_unlimited)
    if not rates:
        parser.error("--no-unlimited leaves nothing to measure without --mbit")
    header = environment.describe("benchmarks.network") | {
        "config": config.public(),
        "network": {"hosts": options.hosts, "rates": rates, "delay_ms": options.delay_ms},
    }
    try:
        with Hosts(options.hosts) as hosts:
            shapes = [partial(hosts.shape, _number(rate), options.delay_ms) for rate in rates]
            shapes[0]()  # says at once what this kernel cannot
            hosts.shape(None)  # what is looked at before the rounds takes no longer than it has to
            with (
                progress() as report,
                Runner(config, able, able[0].name, report, hosts=hosts.names, conditions=shapes) as runner,
            ):
                measured = {result.name: result for result in runner.run()}
    except (OSError, RankFailed) as error:
        print(error, file=sys.stderr)
        return 1
    header["machine"]["load_after"] = os.getloadavg()[0]
    results = [
        measured.get(spec.name) or PeerResult(spec.name, spec.family, spec.about, obstacle=obstacles[spec.name])
        for spec in specs
    ]
    out = options.out or Path(__file__).parent / "results" / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-network"
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "network.jsonl", header, results)
    (out / "network.md").write_text(markdown(header, results))
    if any(result.status == "valid" for result in results):
        draw(out / "network.png", header, results)
    console = Console()
    console.print(table(header, results), *notes(results), sep="\n")
    console.print(f"network.jsonl, network.md and network.png are in {out}", soft_wrap=True)
    for result in results:
        if result.story:
            print(result.story, file=sys.stderr)
    return 1 if any(result.status in ("failed", "invalid") for result in results) else 0


def by_rate(result: PeerResult, rates: Sequence[Rate]) -> dict[Rate, list[float]]:
    """Seconds per step, by round, for each rate: in each round a peer is visited at all of them in turn."""
    return {rate: result.seconds[index :: len(rates)] for index, rate in enumerate(rates)}


def cells(result: PeerResult, rates: Sequence[Rate]) -> list[str]:
    """The table's row of one peer."""
    if result.status in ("not run", "failed"):
        return [result.name, *["-"] * (len(rates) + 1), result.status]
    times = [f"{median(seconds) * 1e3:.0f}" for seconds in by_rate(result, rates).values()]
    return [result.name, f"{max(result.wire) / MIB:.1f}", *times, "ok" if result.status == "valid" else "wrong"]


def titles(rates: Sequence[Rate]) -> list[str]:
    """The table's columns."""
    return ["peer", "wire MiB", *map(_spoken, rates), "losses"]


def table(header: Mapping[str, Any], results: Sequence[PeerResult]) -> Table:
    """The step times as a table for the terminal."""
    drawn = Table(box=box.SIMPLE_HEAD, title=situation(header), title_justify="left")
    for index, title in enumerate(titles(header["network"]["rates"])):
        drawn.add_column(title, justify="right" if index else "left", no_wrap=True)
    for result in results:
        drawn.add_row(*cells(result, header["network"]["rates"]), style="bold" if result.family == "accel" else None)
    return drawn


def situation(header: Mapping[str, Any]) -> str:
    """What was run, in one line."""
    config, network = header["config"], header["network"]
    delay = f", {network['delay_ms']:g} ms from host to host" if network["delay_ms"] else ""
    return (
        f"{config['model']}, {config['ranks']} ranks on {network['hosts']} hosts{delay}: ms per step,"
        f" medians of {config['rounds']} rounds of {config['steps']} steps"
    )


def notes(results: Sequence[PeerResult]) -> list[str]:
    """A line for every peer that has no figures, or wrong ones."""
    lines = [f"{result.name} did not run: {result.obstacle}" for result in results if result.status == "not run"]
    lines += [f"{result.name} failed: {result.failure}" for result in results if result.status == "failed"]
    lines += [f"{result.name} is invalid: its losses are wrong" for result in results if result.status == "invalid"]
    return lines


def markdown(header: Mapping[str, Any], results: Sequence[PeerResult]) -> str:
    """The table as a Markdown page."""
    rates = header["network"]["rates"]
    machine, versions = header["machine"], header["versions"]
    rows = [titles(rates), [":--", *["--:"] * (len(rates) + 2)], *(cells(result, rates) for result in results)]
    lines = [
        f"{situation(header)}; {header['date']}; {machine['processor']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + ".",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "wire: bytes that a rank sends per step, of the rank that sends most.",
        "",
        *(f"- {note}" for note in notes(results)),
        f"- `{header['command']}`",
        "",
        "![chart](network.png)",
    ]
    return "\n".join(lines) + "\n"


def write_jsonl(path: Path, header: Mapping[str, Any], results: Sequence[PeerResult]) -> None:
    """One line about the run, then one line with everything measured of each peer."""
    rates = header["network"]["rates"]
    lines: list[dict[str, Any]] = [{"kind": "run", **header}]
    for result in results:
        seconds = {str(rate): times for rate, times in by_rate(result, rates).items()}
        lines.append({"kind": "peer", **result.record(), "seconds": seconds})
    path.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines))


def draw(path: Path, header: Mapping[str, Any], results: Sequence[PeerResult]) -> None:
    """The chart: step time of each valid peer against bandwidth, as a PNG."""
    rates = header["network"]["rates"]
    shown = [result for result in results if result.status == "valid"]
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (times, relative) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
        for index, result in enumerate(shown):
            curve = by_rate(result, rates)
            look: Any = {"marker": _MARKS[index % len(_MARKS)], "markersize": 5, "linewidth": 1.4, "label": result.name}
            look |= {"linestyle": "-" if result.family == "accel" else (0, (4, 2))}
            if result.family == "baseline":
                look |= {"color": FAMILY_COLOURS["baseline"]}
            (line,) = times.plot([median(seconds) for seconds in curve.values()], **look)
            reference = by_rate(_compared(shown), rates)
            look["color"] = line.get_color()
            relative.plot([median(ratios(curve[rate], reference[rate])) for rate in rates], **look)
        times.set(ylabel="seconds per step", yscale="log")
        relative.set(ylabel=f"step time / {_compared(shown).name}")
        relative.axhline(1.0, color="#2b2f36", linewidth=0.8, linestyle=(0, (4, 3)))
        for axes in (times, relative):
            axes.set_xticks(range(len(rates)), [_spoken(rate) for rate in rates])
            axes.grid(color="#e6e8ec", linewidth=0.8)
            axes.set_axisbelow(True)
        figure.legend(*times.get_legend_handles_labels(), loc="outside right center", frameon=False)
        figure.suptitle(f"{situation(header)}  ·  {header['date'][:10]}", x=0.01, ha="left", fontsize=10)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _compared(shown: Sequence[PeerResult]) -> PeerResult:
    """What the right-hand chart takes ratios to: torch's DDP, or else the first."""
    return next((result for result in shown if result.name == "torch_ddp"), shown[0])


def _number(rate: Rate) -> float | None:
    return None if isinstance(rate, str) else rate


def _spoken(rate: Rate) -> str:
    if isinstance(rate, str):
        return rate
    return f"{rate / 1000:g} Gbit/s" if rate >= 1000 else f"{rate:g} Mbit/s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network",
        description="Step time of our rows and of what people would use instead, against the bandwidth between hosts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--peers",
        metavar="A,B,C",
        default=",".join(DEFAULT_PEERS),
        help=f"out of {', '.join(PEERS)} (default: {', '.join(DEFAULT_PEERS)})",
    )
    add("--model", choices=MODELS, default="gpt-23m", help="(default: %(default)s)")
    add("--hosts", type=int, default=2, metavar="N", help="(default: %(default)s)")
    add("--ranks", type=int, default=2, metavar="N", help="processes of each peer, all hosts' (default: %(default)s)")
    add(
        "--mbit",
        type=float,
        nargs="*",
        default=[300.0, 1000.0, 3000.0],
        metavar="X",
        help="bandwidths of each host in either direction, in Mbit/s (default: 300 1000 3000)",
    )
    add("--no-unlimited", action="store_true", help="leave out the measurement without a limit")
    add("--delay-ms", type=float, default=0.0, metavar="MS", help="from host to host, one way (default: none)")
    add("--rounds", type=int, default=5, metavar="N", help="visits to every peer (default: %(default)s)")
    add("--steps", type=int, default=2, metavar="N", help="timed optimizer steps of a visit (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="where to write (default: a new folder in benchmarks/results)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
