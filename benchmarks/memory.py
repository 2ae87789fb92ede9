"""The memory of one step: ``python -m benchmarks --memory``. How it is measured: benchmarks/timeline.py."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from benchmarks.chart import FAMILY_COLOURS, plt
from benchmarks.config import Config
from benchmarks.crew import LIMIT_SECONDS, Crew, RankFailed
from benchmarks.peers import Spec
from benchmarks.render import MIB, setting, situation
from benchmarks.timeline import PHASES, Timeline

DEFAULT_PEERS = ("torch_fsdp2", "accel_fsdp")
"""The peers of a run that names none."""
COLUMNS = ("peer", "resting MiB", "peak MiB", *(f"{phase} MiB" for phase in PHASES), "unexplained MiB")
LEGEND = (
    "resting: bytes of all tensors between steps, gradients included. peak: the most at any moment of a step. "
    f"{', '.join(PHASES)}: the most within that phase. unexplained: by how much the bytes at the step's end differ "
    "from those at its start and all that the allocator recorded in between. Each on the rank with the highest peak."
)

_PHASE_COLOURS = {"forward": "#f2f4f7", "backward": "#e6e8ec", "optimizer": "#f2f4f7"}
_SHORT = 0.04
"""Phases that take less of a step are not labelled."""


@dataclass(frozen=True, kw_only=True)
class PeerMemory:
    """What was recorded of one peer."""

    name: str
    family: str
    timelines: list[Timeline]
    """By rank."""

    @property
    def largest(self) -> Timeline:
        """The timeline of the rank with the highest peak."""
        return max(self.timelines, key=lambda timeline: timeline.peak)


def record(
    config: Config,
    specs: Sequence[Spec],
    progress: Callable[[str, int, int], None],
    limit: float = LIMIT_SECONDS,
) -> tuple[list[PeerMemory], list[RankFailed]]:
    """Run each peer to itself: the first steps, then one that is recorded.

    Args:
        config: What to run; `rounds` and `steps` do not count.
        specs: The peers that can run here.
        progress: Told, before each peer, what it is, how many are done and how many there are.
        limit: Seconds that a peer may take for one command.

    Returns:
        What was recorded, and what has failed.
    """
    found, failures = [], []
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        for done, spec in enumerate(specs):
            progress(f"{spec.name}: memory of a step", done, len(specs))
            crew = Crew(spec, config, Path(folder), config.ranks, config.threads, limit)
            try:
                crew.answers()
                crew.ask("train", config.warmup)
                found.append(PeerMemory(name=spec.name, family=spec.family, timelines=crew.ask("timeline")))
                crew.ask("close")
            except RankFailed as failure:
                failures.append(failure)
            finally:
                crew.end()
    return found, failures


def obstacle(spec: Spec) -> str | None:
    """Why the steps of a peer cannot be recorded, or None if they can."""
    return "its Trainer runs the loop, so phases cannot be told apart" if spec.adapter.startswith(".trainer:") else None


def cells(result: PeerMemory) -> list[str]:
    """The table's row of one peer, one text per column of `COLUMNS`."""
    timeline = result.largest
    sizes = [timeline.resting, timeline.peak, *map(timeline.peak_of, PHASES), timeline.unexplained]
    return [result.name, *(f"{size / MIB:.1f}" for size in sizes)]


def table(header: Mapping[str, Any], results: Sequence[PeerMemory]) -> Group:
    """Everything for the terminal."""
    drawn = Table(
        title="Memory of a step, MiB",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title_style="bold",
    )
    for column in COLUMNS:
        drawn.add_column(column.removesuffix(" MiB"), justify="left" if column == "peer" else "right", no_wrap=True)
    for result in results:
        drawn.add_row(*cells(result), style="bold" if result.family == "accel" else None)
    return Group(situation(header, []), drawn, LEGEND)


def markdown(header: Mapping[str, Any], results: Sequence[PeerMemory]) -> str:
    """The table as a Markdown page."""
    rows = [COLUMNS, [":--", *["--:"] * (len(COLUMNS) - 1)], *map(cells, results)]
    lines = [
        situation(header, []) + ".",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        LEGEND,
        "",
        f"- `{header['command']}`",
        "",
        "![timeline](memory.png)",
    ]
    return "\n".join(lines) + "\n"


def write_jsonl(path: Path, header: Mapping[str, Any], results: Sequence[PeerMemory]) -> None:
    """One line about the run, then one line with every moment of each peer."""
    lines = [{"kind": "run", **header}, *({"kind": "memory", **asdict(result)} for result in results)]
    path.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines))


def draw(path: Path, header: Mapping[str, Any], results: Sequence[PeerMemory]) -> None:
    """The chart: the bytes of each peer over one step, side by side, as a PNG."""
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False}
    with plt.rc_context(style):
        figure, panels = plt.subplots(
            1, len(results), sharey=True, squeeze=False, figsize=(1 + 5.5 * len(results), 4.2), layout="constrained"
        )
        top = 1.12 * max(result.largest.peak for result in results) / MIB
        for axes, result in zip(panels[0], results, strict=True):
            timeline = result.largest
            colour = FAMILY_COLOURS[result.family]
            ends = [start for _, start in timeline.phases[1:]] + [1.0]
            for (name, start), end in zip(timeline.phases, ends, strict=True):
                axes.axvspan(start, end, color=_PHASE_COLOURS[name], linewidth=0)
                if end - start > _SHORT:
                    axes.text((start + end) / 2, 0.985 * top, name, ha="center", va="top", color="#5b6472")
            # The last size stays until the step's end.
            moments = [*timeline.moments, 1.0]
            sizes = [size / MIB for size in (*timeline.sizes, timeline.sizes[-1])]
            axes.fill_between(moments, sizes, step="post", color=colour, alpha=0.35, linewidth=0)
            axes.step(moments, sizes, where="post", color=colour, linewidth=1.0)
            resting, peak = timeline.resting / MIB, timeline.peak / MIB
            for level, label in ((resting, "resting"), (peak, "peak")):
                axes.axhline(level, color="#2b2f36", linewidth=0.8, linestyle=(0, (4, 3)))
                axes.text(0.01, level + 0.008 * top, f"{label} {level:.1f}", va="bottom", color="#2b2f36")
            axes.set(xlim=(0, 1), ylim=(0, top), xlabel="fraction of the step")
            axes.set_title(result.name, loc="left", fontweight="bold")
            axes.tick_params(length=0)
            axes.grid(axis="y", color="white", linewidth=0.8)
            axes.set_axisbelow(True)
        panels[0][0].set_ylabel("MiB of tensors on a rank")
        machine = header["machine"]
        figure.suptitle(
            f"{setting(header['config'])}"
            f"  ·  {machine['processor']}, {machine['cores']} cores  ·  {header['date'][:10]}",
            x=0.01,
            ha="left",
            fontsize=11,
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)
