"""What was measured, as a terminal table, Markdown, JSON lines and a chart."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from benchmarks.measure import KINDS
from benchmarks.peers import Spec
from benchmarks.result import PeerResult
from benchmarks.stats import Spread

matplotlib.use("Agg")  # draws to files, on machines without a screen too
from matplotlib import pyplot as plt  # noqa: E402

MIB = 2**20
COLUMNS = (
    "peer",
    "step ms",
    "ratio",
    "quartiles",
    "peak MiB",
    *(f"{kind} MiB" for kind in KINDS),
    "wire MiB",
    "calls",
    "losses",
)

FAMILY_COLOURS = {"baseline": "#c3c7cf", "torch": "#7d8797", "lightning": "#a890c4", "accel": "#6a35c9"}
_KIND_COLOURS = {"parameters": "#3b6fb6", "gradients": "#e9a23b", "optimizer": "#3f9b7a", "other": "#c3c7cf"}


def cells(result: PeerResult) -> list[str]:
    """The table's row of one peer, one text per column of `COLUMNS`."""
    if result.status in ("not run", "failed"):
        return [result.name, *["-"] * (len(COLUMNS) - 2), result.status]
    ratio = Spread.of(result.ratios)
    rest = largest_rank(result)
    return [
        result.name,
        f"{1000 * median(result.seconds):.1f}",
        f"{ratio.median:.3f}",
        f"{ratio.lower_quartile:.2f}..{ratio.upper_quartile:.2f}",
        _mib(max(result.peak_memory)),
        *(_mib(rest[kind]) for kind in KINDS),
        _mib(fmean(result.wire)),
        str(sum(result.collectives.values())),
        _verdict(result),
    ]


def largest_rank(result: PeerResult) -> dict[str, int]:
    """The bytes at rest of the rank that holds most."""
    return max(result.at_rest, key=lambda kinds: sum(kinds.values()))


def legend(header: Mapping[str, Any]) -> str:
    """What the columns mean, in one paragraph."""
    config = header["config"]
    return (
        f"step ms: slowest rank, median of {config['rounds']} rounds of {config['steps']} steps. "
        f"ratio: to {header['reference']} in the same round, median and quartiles. "
        "peak: resident-set high-water mark above that before the model. "
        f"{', '.join(KINDS)}: bytes alive when an update is due, on the rank that holds most. "
        "wire: bytes that a rank sends, or reads from another's memory, per step. "
        "calls: collectives, sends and receives per step. "
        "losses: the largest relative difference from one process on the global batch "
        "(single sees one rank's tokens: first loss only)."
    )


def situation(header: Mapping[str, Any], results: Sequence[PeerResult]) -> str:
    """The run and the machine, in one paragraph."""
    config, machine, versions = header["config"], header["machine"], header["versions"]
    others = [share for result in results for share in result.others_cpu]
    shared = (
        f"; other processes took {median(others):.0%} of it meanwhile (at most {max(others):.0%})" if others else ""
    )
    return (
        f"{config['model']}, {config['ranks']} ranks × {config['threads']} threads, gloo, fp32, fused AdamW, "
        f"{config['accumulate']} micro-batches per step; {header['date']}; "
        f"{machine['processor']}, {machine['cores']} cores{shared}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    )


def notes(header: Mapping[str, Any], results: Sequence[PeerResult]) -> list[str]:
    """A line for every peer that did not run, failed, was compared with another, or whose losses are wrong."""
    lines = [f"{result.name} did not run: {result.obstacle}" for result in results if result.status == "not run"]
    lines += [f"{result.name} failed: {result.failure}" for result in results if result.status == "failed"]
    others: dict[str | None, list[str]] = {
        result.ratio_to: [] for result in results if result.ratio_to not in (None, header["reference"])
    }
    for result in results:
        if result.ratio_to in others:
            others[result.ratio_to].append(result.name)
    lines += [f"ratios of {', '.join(names)} are to {other}" for other, names in others.items()]
    for result in results:
        if result.status == "invalid":
            check = result.check
            assert check is not None
            lines.append(
                f"{result.name} is invalid: a loss of its first {check.steps} steps is off by "
                f"{check.difference:.1e} of its value, at most {check.tolerance:.0e} is right"
            )
    return lines


def tables(header: Mapping[str, Any], results: Sequence[PeerResult]) -> Group:
    """Everything for the terminal: two tables, so that they fit into 80 columns."""
    parts: list[RenderableType] = [situation(header, results)]
    for title, columns in (("Time and communication", (*COLUMNS[:4], *COLUMNS[9:])), ("Memory, MiB", COLUMNS[4:9])):
        drawn = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
        drawn.add_column(COLUMNS[0], no_wrap=True)
        columns = tuple(column for column in columns if column != COLUMNS[0])
        for column in columns:
            name = column.removesuffix(" MiB") if title.endswith("MiB") else column
            drawn.add_column(name, justify="right", no_wrap=True)
        for result in results:
            own = "bold" if result.family == "accel" else None
            style = {"invalid": "red", "failed": "red", "not run": "dim"}.get(result.status, own)
            row = dict(zip(COLUMNS, cells(result), strict=True))
            drawn.add_row(result.name, *(row[column] for column in columns), style=style)
        parts.append(drawn)
    return Group(*parts, legend(header), *notes(header, results))


def peer_list(specs: Sequence[Spec], obstacles: Mapping[str, str | None]) -> Table:
    """The peers and whether they run here."""
    drawn = Table(box=box.SIMPLE_HEAD)
    for column in ("peer", "what it is", "runs here"):
        drawn.add_column(column)
    for spec in specs:
        obstacle = obstacles[spec.name]
        drawn.add_row(
            spec.name, spec.about, f"no: {obstacle}" if obstacle else "yes", style="dim" if obstacle else None
        )
    return drawn


def markdown(header: Mapping[str, Any], results: Sequence[PeerResult]) -> str:
    """The table as a Markdown page."""
    rows = [COLUMNS, [":--", *["--:"] * (len(COLUMNS) - 1)], *(cells(result) for result in results)]
    lines = [
        situation(header, results) + ".",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        legend(header),
        "",
        *(f"- {note}" for note in notes(header, results)),
        f"- `{header['command']}`",
        "",
        "![chart](chart.png)",
    ]
    return "\n".join(lines) + "\n"


def write_jsonl(path: Path, header: Mapping[str, Any], results: Sequence[PeerResult]) -> None:
    """One line about the run, then one line with everything measured of each peer."""
    lines = [{"kind": "run", **header}, *({"kind": "peer", **result.record()} for result in results)]
    path.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines))


def draw(path: Path, header: Mapping[str, Any], results: Sequence[PeerResult]) -> None:
    """The chart: step time, memory and wire of the peers that ran, side by side, as a PNG."""
    shown = [result for result in results if result.status in ("valid", "invalid")]
    places = range(len(shown))
    names = [result.name for result in shown]
    colours = [FAMILY_COLOURS[result.family] for result in shown]
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False}
    with plt.rc_context(style):
        figure, (time, rest, wire) = plt.subplots(
            1, 3, sharey=True, figsize=(13, 1.9 + 0.42 * len(shown)), width_ratios=(1.25, 1.5, 1), layout="constrained"
        )
        spreads = [Spread.of(result.ratios) for result in shown]
        medians = [spread.median for spread in spreads]
        # Quartiles: a single round in which the machine was busy elsewhere would dwarf everything else.
        reach = [[s.median - s.lower_quartile for s in spreads], [s.upper_quartile - s.median for s in spreads]]
        hatches = ["//" if result.check is not None and not result.check.passed else "" for result in shown]
        time.barh(places, medians, color=colours, height=0.66, hatch=hatches, edgecolor="white", linewidth=0)
        time.errorbar(medians, places, xerr=reach, fmt="none", ecolor="#2b2f36", elinewidth=1.1, capsize=2.5)
        time.axvline(1.0, color="#2b2f36", linewidth=0.8, linestyle=(0, (4, 3)))
        widest = max(spread.upper_quartile for spread in spreads)
        for place, spread in zip(places, spreads, strict=True):
            time.text(
                spread.upper_quartile + 0.02 * widest, place, f"{spread.median:.2f}", va="center", color="#2b2f36"
            )
        time.set(xlim=(0, 1.14 * widest), xlabel=f"step time / {header['reference']}")
        time.set_title("Step time", loc="left", fontweight="bold")
        time.set_yticks(places, [name + " (losses wrong)" * bool(h) for name, h in zip(names, hatches, strict=True)])

        left = [0.0] * len(shown)
        for kind in KINDS:
            sizes = [largest_rank(result)[kind] / MIB for result in shown]
            rest.barh(places, sizes, left=left, color=_KIND_COLOURS[kind], height=0.66, label=kind)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
        peaks = [max(result.peak_memory) / MIB for result in shown]
        rest.plot(peaks, places, "|", color="#2b2f36", markersize=13, markeredgewidth=1.6, label="peak, measured apart")
        rest.set(xlabel="MiB per rank", xlim=(0, None))
        rest.set_title("Memory when an update is due", loc="left", fontweight="bold")
        # Below the axes, where no bar is, however many peers there are.
        figure.legend(*rest.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)

        sent = [fmean(result.wire) / MIB for result in shown]
        wire.barh(places, sent, color=colours, height=0.66)
        for place, result, size in zip(places, shown, sent, strict=True):
            calls = sum(result.collectives.values())
            label = f"{size:.1f} in {calls} calls" if calls else "nothing"
            wire.text(size + 0.02 * max(sent), place, label, va="center", color="#2b2f36")
        wire.set(xlabel="MiB sent per rank and step", xlim=(0, 1.45 * max(sent) or 1))
        wire.set_title("Wire", loc="left", fontweight="bold")

        time.invert_yaxis()
        for axes in (time, rest, wire):
            axes.tick_params(length=0)
            axes.grid(axis="x", color="#e6e8ec", linewidth=0.8)
            axes.set_axisbelow(True)
        config = header["config"]
        machine = header["machine"]
        figure.suptitle(
            f"{config['model']}, {config['ranks']} ranks × {config['threads']} threads, gloo, fp32, fused AdamW"
            f"  ·  {machine['processor']}, {machine['cores']} cores  ·  {header['date'][:10]}",
            x=0.01,
            ha="left",
            fontsize=11,
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}"


def _verdict(result: PeerResult) -> str:
    if result.check is None:
        return "not checked"
    return f"{'ok' if result.check.passed else 'off'} {result.check.difference:.0e}"
