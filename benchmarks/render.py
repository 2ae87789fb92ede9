"""What was measured, as terminal tables, Markdown and JSON lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from benchmarks.measure import KINDS
from benchmarks.peers import Spec
from benchmarks.result import PeerResult
from benchmarks.stats import Spread

MIB = 2**20
COLUMNS = (
    "peer",
    "step ms",
    "ratio",
    "quartiles",
    "per s",
    "over single",
    "start s",
    "save s",
    "load s",
    "wire MiB",
    "calls",
    "peak MiB",
    "alloc MiB",
    *(f"{kind} MiB" for kind in KINDS),
    "losses",
)
_TABLES = (
    ("Time and communication", ("step ms", "ratio", "quartiles", "wire MiB", "losses")),
    ("Throughput, start, checkpoints and calls", ("per s", "over single", "start s", "save s", "load s", "calls")),
    ("Memory, MiB", ("peak MiB", "alloc MiB", *(f"{kind} MiB" for kind in KINDS))),
)


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
        f"{result.units_per_step / median(result.seconds):,.0f}",
        "-" if result.over_single is None else f"{result.over_single:+.1%}",
        f"{max(result.start_seconds):.1f}",
        *_saving(result),
        _mib(fmean(result.wire)),
        str(sum(result.collectives.values())),
        _mib(max(result.peak_memory)),
        _mib(max(result.allocator_peak)) if result.allocator_peak else "-",
        *(_mib(rest[kind]) for kind in KINDS),
        _verdict(result),
    ]


def largest_rank(result: PeerResult) -> dict[str, int]:
    """The bytes at rest of the rank that holds most."""
    return max(result.at_rest, key=lambda kinds: sum(kinds.values()))


def setting(config: Mapping[str, Any]) -> str:
    """What was trained, in one line."""
    parts = [
        f"{config['model']}",
        f"{config['ranks']} ranks × {config['threads']} threads",
        f"gloo, {config['precision']}, fused AdamW",
        f"{config['accumulate']} micro-batches per step",
    ]
    return ", ".join(parts + ["activations computed again"] * bool(config["recompute"]))


def legend(header: Mapping[str, Any]) -> str:
    """What the columns mean, in one paragraph."""
    config = header["config"]
    return (
        f"step ms: slowest rank, median of {config['rounds']} rounds of {config['steps']} steps. "
        f"ratio: to {header['reference']} in the same round, median and quartiles. "
        f"per s: {header['unit']} of all ranks. over single: what the step takes more than single's. "
        "start s: from the start of the process to the end of the first step, imports included. "
        f"save s, load s: all that is trained, medians of {config['saves']}, one by one after the rounds; until files "
        "have reached the disk, and out of the page cache. "
        "wire: bytes that a rank sends, or reads from another's memory, per step. "
        "calls: collectives, sends and receives per step. "
        "losses: the largest relative difference from one process on the global batch "
        "(single sees one rank's batches: first loss only). "
        "peak: resident-set high-water mark above that before the model. "
        "alloc: the most bytes that tensors have at any moment of a step. "
        f"{', '.join(KINDS)}: bytes alive when an update is due, on the rank that holds most."
    )


def situation(header: Mapping[str, Any], results: Sequence[PeerResult]) -> str:
    """The run and the machine, in one paragraph."""
    machine, versions = header["machine"], header["versions"]
    others = [share for result in results for share in result.others_cpu]
    shared = (
        f"; other processes took {median(others):.0%} of it meanwhile (at most {max(others):.0%})" if others else ""
    )
    return (
        f"{setting(header['config'])}; {header['date']}; {machine['processor']}, {machine['cores']} cores{shared}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    )


def notes(header: Mapping[str, Any], results: Sequence[PeerResult]) -> list[str]:
    """A line for all that did not run, failed, was compared with another, has wrong losses, or does not load."""
    lines = [f"{result.name} did not run: {result.obstacle}" for result in results if result.status == "not run"]
    lines += [f"{result.name} failed: {result.failure}" for result in results if result.status == "failed"]
    lines += [
        f"{result.name}: saving and loading not measured: {result.unsaved}" for result in results if result.unsaved
    ]
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
    """Everything for the terminal: three tables, so that they fit into 80 columns."""
    parts: list[RenderableType] = [situation(header, results)]
    for title, columns in _TABLES:
        drawn = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
        drawn.add_column(COLUMNS[0], no_wrap=True)
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


def markdown(header: Mapping[str, Any], results: Sequence[PeerResult], chart: str | None = "chart.png") -> str:
    """The table as a part of a Markdown page.

    Args:
        header: The run.
        results: Its peers.
        chart: The file with its chart, beside the page.
    """
    rows = [COLUMNS, [":--", *["--:"] * (len(COLUMNS) - 1)], *(cells(result) for result in results)]
    lines = [
        f"## {setting(header['config'])}",
        "",
        situation(header, results) + ".",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        legend(header),
        "",
        *(f"- {note}" for note in notes(header, results)),
        f"- `{header['command']}`",
    ]
    return "\n".join(lines + ["", f"![chart]({chart})"] * (chart is not None)) + "\n"


def write_jsonl(path: Path, runs: Sequence[tuple[Mapping[str, Any], Sequence[PeerResult]]]) -> None:
    """For each run, one line about it and then one with everything measured of each peer."""
    lines: list[dict[str, Any]] = []
    for header, results in runs:
        lines += [{"kind": "run", **header}, *({"kind": "peer", **result.record()} for result in results)]
    path.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines))


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}"


def _saving(result: PeerResult) -> list[str]:
    measured = () if result.unsaved else (result.save_seconds, result.load_seconds)
    return [f"{median(seconds):.3f}" for seconds in measured] or ["-", "-"]


def _verdict(result: PeerResult) -> str:
    if result.check is None:
        return "not checked"
    return f"{'ok' if result.check.passed else 'off'} {result.check.difference:.0e}"
