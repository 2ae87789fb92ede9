"""The command line."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import axes, baseline, chart, fit, memory, render
from benchmarks.config import Config
from benchmarks.crew import LIMIT_SECONDS, RankFailed
from benchmarks.environment import describe, load
from benchmarks.models import MODELS
from benchmarks.peers import PEERS, QUICK_PEERS, REFERENCE, Spec, choose
from benchmarks.progress import progress
from benchmarks.result import PeerResult
from benchmarks.runner import Runner

EXAMPLES = """
examples:
  python -m benchmarks --quick                       the peers that matter most, on a tiny model
  python -m benchmarks                               every peer on the 23M model
  python -m benchmarks --full                        every peer on three models in two precisions
  python -m benchmarks --peers single,torch_ddp,accel_zero2 --rounds 9
                                                     three peers, tighter medians
  python -m benchmarks --accumulate 1,4 --recompute off,on
                                                     four tables, one for each combination
  python -m benchmarks --peers trainer_ddp,trainer_accel_ddp --reference trainer_ddp
                                                     the Trainer with its own strategy and with ours
  python -m benchmarks --quick --baseline before.jsonl
                                                     has anything become slower than it was in that results.jsonl?
  python -m benchmarks --memory --warmup 1           the memory of every moment of a step, ours beside FSDP2's
  python -m benchmarks --list                        what can be compared, and what cannot run here, and why

A peer that crashes, or gives no answer within --limit, is cut off and listed with the reason; the others go on.
The exit status is 1 if a peer fails, if its losses are wrong, or if it is worse than in the baseline.
"""

DEFAULT = {"model": ["gpt-23m"], "precision": ["32-true"], "rounds": 5, "steps": 4}
# Steps of milliseconds are timed in numbers: two of them say more about who has slept before than about the peer.
QUICK = DEFAULT | {"model": ["gpt-tiny"], "rounds": 3, "steps": 20}
FULL = DEFAULT | {"model": ["gpt-23m", "mlp", "resnet"], "precision": ["32-true", "bf16-mixed"], "rounds": 9}

Run = tuple[dict[str, Any], list[PeerResult]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("memory and wire are measured with the Linux kernel's counters; this is " + sys.platform)
    for name, value in (QUICK if options.quick else FULL if options.full else DEFAULT).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    configs = axes.configs(
        options, threads=options.threads, rounds=options.rounds, steps=options.steps, warmup=options.warmup
    )
    if options.memory and (len(configs) > 1 or options.baseline is not None):
        parser.error("--memory records one combination of axes, and compares with no baseline")
    default = memory.DEFAULT_PEERS if options.memory else QUICK_PEERS if options.quick else tuple(PEERS)
    try:
        specs = choose(list(default) if options.peers is None else options.peers)
        choose([options.reference])
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    if options.list:
        console.print(render.peer_list(specs, {spec.name: spec.obstacle(configs[0]) for spec in specs}))
        return 0
    able = [_able(parser, config, specs, options) for config in configs]
    now = datetime.now(timezone.utc)
    out = options.out or Path(__file__).parent / "results" / f"{now:%Y%m%d-%H%M%S}-{axes.slug(configs[0])}"
    if options.memory:
        return _record_memory(console, configs[0], able[0], out, options)
    runs: list[Run] = []
    for config, present in zip(configs, able, strict=True):
        try:
            runs.append(_measure(config, specs, present, options))
        except RankFailed as failure:
            print(failure, file=sys.stderr)
            return 1
        console.print(render.tables(*runs[-1]))
        _write(out, runs, configs)  # after each: a long run that is stopped leaves what it has
    console.print(f"results.jsonl, table.md and the charts are in {out}", soft_wrap=True)
    return _verdict(runs, options.baseline)


def _able(
    parser: argparse.ArgumentParser, config: Config, specs: Sequence[Spec], options: argparse.Namespace
) -> list[Spec]:
    """The peers that can take part in a run; ends the program if it makes no sense."""
    obstacles = {spec.name: _obstacle(spec, config, options) for spec in specs}
    able = [spec for spec in specs if obstacles[spec.name] is None]
    if not able:
        parser.error("; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items()))
    if options.peers is not None and options.reference != REFERENCE and options.reference not in options.peers:
        parser.error(f"--reference {options.reference} is not among --peers {','.join(options.peers)}")
    if short := fit.shortage(config, len(able)):
        parser.error(short)
    return able


def _obstacle(spec: Spec, config: Config, options: argparse.Namespace) -> str | None:
    return spec.obstacle(config) or (memory.obstacle(spec) if options.memory else None)


def _header(config: Config, reference: str) -> dict[str, Any]:
    task = MODELS[config.model]
    return describe() | {"config": config.public(), "reference": reference, "unit": task.unit}


def _measure(config: Config, specs: Sequence[Spec], able: Sequence[Spec], options: argparse.Namespace) -> Run:
    """Measure one combination of axes; what cannot run is among the results, too."""
    names = [spec.name for spec in able]
    reference = options.reference if options.reference in names else names[0]
    header = _header(config, reference)
    limits = {"together": options.together, "limit": options.limit}
    with progress() as report, Runner(config, able, reference, report, **limits) as runner:
        measured = {result.name: result for result in runner.run()}
    header["machine"]["load_after"] = load()
    results = [
        measured.get(spec.name)
        or PeerResult(spec.name, spec.family, spec.about, obstacle=_obstacle(spec, config, options))
        for spec in specs
    ]
    return header, results


def _write(out: Path, runs: Sequence[Run], configs: Sequence[Config]) -> None:
    """Write all that there is so far."""
    out.mkdir(parents=True, exist_ok=True)
    render.write_jsonl(out / "results.jsonl", runs)
    pages = []
    for (header, results), config in zip(runs, configs, strict=False):
        name = "chart.png" if len(configs) == 1 else f"chart-{axes.slug(config)}.png"
        shown = any(result.status in ("valid", "invalid") for result in results)
        if shown:
            chart.draw(out / name, header, results)
        pages.append(render.markdown(header, results, name if shown else None))
    (out / "table.md").write_text("\n".join(pages))


def _verdict(runs: Sequence[Run], before: Path | None) -> int:
    """The exit status, and why, on stderr."""
    status = 0
    for header, results in runs:
        if wrong := [result.name for result in results if result.status == "invalid"]:
            where = render.setting(header["config"])
            print(f"The losses of {', '.join(wrong)} are wrong ({where}): the figures mean nothing.", file=sys.stderr)
            status = 1
        for result in results:
            if result.status == "failed":
                print(result.story, file=sys.stderr)
                status = 1
    if before is not None:
        try:
            changes, missing = baseline.compare(before, runs)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        for line in (*changes, *missing):
            print(line)
        if missing or any(change.worse for change in changes):
            status = 1
    return status


def _record_memory(
    console: Console, config: Config, specs: Sequence[Spec], out: Path, options: argparse.Namespace
) -> int:
    """Record one step of each peer; return the exit status."""
    header = _header(config, options.reference)
    with progress() as report:
        results, failures = memory.record(config, specs, report, options.limit)
    for failure in failures:
        print(failure, file=sys.stderr)
    if not results:
        return 1
    console.print(memory.table(header, results))
    out.mkdir(parents=True, exist_ok=True)
    memory.write_jsonl(out / "memory.jsonl", header, results)
    (out / "memory.md").write_text(memory.markdown(header, results))
    memory.draw(out / "memory.png", header, results)
    console.print(f"memory.jsonl, memory.md and memory.png are in {out}", soft_wrap=True)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Step time, memory and communication of our rows beside what people would use instead.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--peers",
        type=axes.several(str),
        metavar="A,B,C",
        help=f"out of {', '.join(PEERS)} (default: all; with --quick {', '.join(QUICK_PEERS)}; "
        f"with --memory {', '.join(memory.DEFAULT_PEERS)})",
    )
    add(
        "--reference",
        default=REFERENCE,
        metavar="A",
        help="has ratio 1.00 (default: %(default)s, else the first)",
    )
    axes.add_arguments(add)
    add("--rounds", type=axes.positive, metavar="N", help=f"visits to every peer (default: {DEFAULT['rounds']})")
    add("--steps", type=axes.positive, metavar="N", help=f"timed steps of a visit (default: {DEFAULT['steps']})")
    add("--warmup", type=axes.positive, default=2, metavar="N", help="untimed first steps (default: %(default)s)")
    add("--threads", type=axes.positive, default=1, metavar="N", help="threads of each process (default: %(default)s)")
    add("--together", type=axes.positive, metavar="N", help="peers alive at a time (default: what memory takes)")
    add(
        "--limit",
        type=axes.positive,
        default=int(LIMIT_SECONDS),
        metavar="S",
        help="seconds that a peer may take to start, and for each visit (default: %(default)s)",
    )
    extent = parser.add_mutually_exclusive_group()
    for option, defaults in (("--quick", QUICK), ("--full", FULL)):
        models, precisions = ",".join(defaults["model"]), ",".join(defaults["precision"])
        text = f"unless given: {models} in {precisions}, {defaults['rounds']} rounds of {defaults['steps']} steps"
        extent.add_argument(option, action="store_true", help=text)
    add(
        "--baseline",
        type=_existing,
        metavar="FILE",
        help="a results.jsonl; the exit status is 1 if a ratio is worse than in it by more than rounds are spread",
    )
    add(
        "--memory",
        action="store_true",
        help="instead of all else: the bytes of all tensors at every moment of one step, as a table and a chart",
    )
    add("--out", type=Path, metavar="DIR", help="where to write (default: a new folder in benchmarks/results)")
    add("--list", action="store_true", help="list the peers and whether they run here, and stop")
    return parser


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"expected a file, found none at {text}")
    return path
