"""A plan as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_accel.convert.sizes import format_size
from lightning_accel.planning.ledger import KINDS

if TYPE_CHECKING:
    from lightning_accel.planning.plan import Plan

_GB = 1e9
_COLOURS = dict(
    zip(KINDS, ("#4c72b0", "#8fb0dc", "#55a868", "#c44e52", "#bbbbbb", "#8172b3", "#dd8452", "#dcdcdc"), strict=True)
)


def draw(plan: Plan, path: Path) -> None:
    """Draw what the peak of each row consists of, what each sends, and one step of the cheapest.

    Args:
        plan: What to draw.
        path: Where to write; its suffix says in which format.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.

    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected matplotlib, which draws plans, to be installed. pip install matplotlib"
        ) from error
    figure = Figure(figsize=(12, 2.5 + 0.32 * len(plan.rows) + 2.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.5 + 0.32 * len(plan.rows), 2.5])
    above, below = parts
    peaks, wire = above.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    places = range(len(plan.rows))
    left = [0.0] * len(plan.rows)
    for kind in KINDS:
        sizes = [row.peak[kind] / _GB for row in plan.rows]
        if any(sizes):
            peaks.barh(places, sizes, left=left, color=_COLOURS[kind], label=kind.replace("_", " "))
            left = [start + size for start, size in zip(left, sizes, strict=True)]
    if plan.memory is not None:
        peaks.axvline(plan.memory / _GB, color="black", linestyle="--", label=f"memory, {format_size(plan.memory)}")
    peaks.set_yticks(list(places), [row.title for row in plan.rows])
    peaks.invert_yaxis()
    peaks.set_xlabel("GB per rank at the peak")
    peaks.legend(fontsize="small")
    wire.barh(places, [row.wire_bytes / _GB for row in plan.rows], color="#64b5cd")
    wire.set_xlabel("GB sent per rank and step")
    row = plan.best or min(plan.rows, key=lambda row: row.peak_bytes)
    course = below.subplots()
    moments = row.course.moments
    kinds = [kind for kind in KINDS if any(moment[kind] for moment in moments)]
    course.stackplot(
        range(len(moments)),
        [[moment[kind] / _GB for moment in moments] for kind in kinds],
        colors=[_COLOURS[kind] for kind in kinds],
        step="post",
    )
    for phase in ("backward", "step"):
        course.axvline(row.course.phases.index(phase), color="black", linewidth=0.8)
        course.text(row.course.phases.index(phase), 0, f" {phase}", fontsize="small")
    course.set_xlabel(f"one step of {row.title}: allocations and releases, one after the other")
    course.set_ylabel("GB")
    course.margins(x=0)
    figure.suptitle(f"{plan.model}: {plan.parameters:,} parameters, {plan.precision}, {plan.ranks} ranks")
    figure.savefig(path, dpi=120)
