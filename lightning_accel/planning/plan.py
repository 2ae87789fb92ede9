"""Which row a model can be trained with, and what each costs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_accel.convert.sizes import format_size, parse_size
from lightning_accel.core.partition import Units, find_blocks
from lightning_accel.core.placement import find_row
from lightning_accel.planning.ledger import KINDS, Course, Kind
from lightning_accel.planning.precision import Precision
from lightning_accel.planning.simulation import Outcome, Setting
from lightning_accel.planning.simulations import simulations
from lightning_accel.planning.subject import OptimizerMaker, Subject

ROWS = ("ddp", "zero1", "zero2", "fsdp_partial", "fsdp", "fsdp_hybrid")
"""What is planned by default."""
RANKS_OF_NODE = 8
"""How many ranks divide a copy under hybrid sharding, unless told."""
_ALIKE = 0.02
"""Rows whose wire bytes differ by less than this share of them cost the same: padding and small messages differ."""


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """One row: what a rank allocates and sends in one step."""

    row: str
    """The name after ``accel_``."""
    checkpointing: bool
    """Whether the activations of blocks are computed again in backward."""
    at_rest: dict[Kind, int]
    """Bytes between steps, by kind."""
    peak: dict[Kind, int]
    """Bytes when there are most, by kind."""
    most: dict[Kind, int]
    """Most bytes of each kind at any time."""
    bytes_sent: dict[str, int]
    """Bytes that a rank sends in a step, by kind of collective."""
    collectives: dict[str, int]
    """Collectives in a step, by kind."""
    course: Course = field(repr=False, compare=False)
    """Live bytes in each moment of a step."""

    @property
    def peak_bytes(self) -> int:
        """Most bytes at any time."""
        return sum(self.peak.values())

    @property
    def rest_bytes(self) -> int:
        """Bytes between steps."""
        return sum(self.at_rest.values())

    @property
    def wire_bytes(self) -> int:
        """Bytes that a rank sends in a step."""
        return sum(self.bytes_sent.values())

    @property
    def title(self) -> str:
        """The strategy, as a user says it."""
        return f"accel_{self.row}" + " + checkpointing" * self.checkpointing

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the course."""
        return {
            "row": self.row,
            "checkpointing": self.checkpointing,
            "at_rest": dict(self.at_rest),
            "peak": dict(self.peak),
            "most": dict(self.most),
            "peak_bytes": self.peak_bytes,
            "rest_bytes": self.rest_bytes,
            "wire_bytes": self.wire_bytes,
            "bytes_sent": dict(self.bytes_sent),
            "collectives": dict(self.collectives),
        }

    @staticmethod
    def of(setting: Setting, outcome: Outcome) -> RowPlan:
        """What a simulation has found."""
        moments = outcome.course.moments
        return RowPlan(
            row=setting.row.name,
            checkpointing=setting.checkpointing,
            at_rest=outcome.at_rest,
            peak=outcome.course.peak,
            most={kind: max(moment[kind] for moment in moments) for kind in KINDS},
            bytes_sent=outcome.report.bytes_sent,
            collectives=outcome.report.collectives,
            course=outcome.course,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every row costs on each rank. ``print`` shows a table."""

    model: str
    parameters: int
    """Trainable ones."""
    ranks: int
    shard_size: int
    """How many ranks divide a copy under hybrid sharding."""
    precision: str
    memory: int | None
    """Bytes that a rank has."""
    rows: tuple[RowPlan, ...]

    def fitting(self) -> list[RowPlan]:
        """The rows that fit the memory, the cheapest first; all of them if no memory was given.

        The fewer bytes a row sends the cheaper it is. Of rows that send the same (to 2 %) those without checkpointing
        come first, as they compute less, and then those that need less memory.
        """
        left = [row for row in self.rows if self.memory is None or row.peak_bytes <= self.memory]
        found: list[RowPlan] = []
        while left:
            least = min(row.wire_bytes for row in left)
            alike = [row for row in left if row.wire_bytes <= least * (1 + _ALIKE)]
            found += sorted(alike, key=lambda row: (row.checkpointing, row.peak_bytes))
            left = [row for row in left if row not in alike]
        return found

    @property
    def best(self) -> RowPlan | None:
        """The cheapest row that fits; None if none does."""
        return next(iter(self.fitting()), None)

    def why(self) -> str:
        """One line: which row, and why."""
        best = self.best
        if best is None:
            least = min(self.rows, key=lambda row: row.peak_bytes)
            assert self.memory is not None
            return (
                f"No row fits {format_size(self.memory)}: {least.title} needs least, {format_size(least.peak_bytes)} on"
                f" each of {self.ranks} ranks. Use more ranks, a smaller batch, or offload='optimizer'."
            )
        limit = "" if self.memory is None else f" of {format_size(self.memory)}"
        worse = [row for row in self.rows if self.memory is not None and row.peak_bytes > self.memory]
        names = ", ".join(f"{row.title} {format_size(row.peak_bytes)}" for row in worse)
        return (
            f"{best.title}: {format_size(best.peak_bytes)}{limit} at the peak on each of {self.ranks} ranks, and"
            f" {format_size(best.wire_bytes)} sent per step" + f" (too large: {names})" * bool(worse)
        )

    def table(self) -> Table:
        """The rows, for a terminal: what the peak consists of, by kind."""
        title = f"{self.model}: {self.parameters:,} parameters, {self.precision}, {self.ranks} ranks; bytes per rank"
        table = Table(title=title, title_justify="left")
        table.add_column("strategy", no_wrap=True)
        for name in ("at rest", *(kind.replace("_", " ") for kind in _shown(self.rows)), "peak", "sent per step"):
            table.add_column(name, justify="right")
        table.add_column("collectives", justify="right")
        best, fitting = self.best, self.fitting()
        for row in self.rows:
            style = "bold green" if row is best else "" if row in fitting else "dim"
            table.add_row(
                row.title + " *" * (row is best),
                format_size(row.rest_bytes),
                *(format_size(row.peak[kind]) for kind in _shown(self.rows)),
                format_size(row.peak_bytes) + " !" * (row not in fitting),
                format_size(row.wire_bytes),
                str(sum(row.collectives.values())),
                style=style,
            )
        table.caption = f"* {self.why()}" if best else f"! {self.why()}"
        table.caption_justify = "left"
        return table

    def __str__(self) -> str:
        console = Console(width=200, force_terminal=False, color_system=None)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()

    def to_dict(self) -> dict[str, Any]:
        """Plain data: numbers, strings and collections of these."""
        best = self.best
        return {
            "model": self.model,
            "parameters": self.parameters,
            "ranks": self.ranks,
            "shard_size": self.shard_size,
            "precision": self.precision,
            "memory": self.memory,
            "best": None if best is None else {"row": best.row, "checkpointing": best.checkpointing},
            "rows": [row.to_dict() for row in self.rows],
        }

    def draw(self, path: str | Path) -> None:
        """Draw what each row's peak consists of and what it sends, as a picture (PNG, or what the suffix says).

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.

        """
        from lightning_accel.planning.drawing import draw

        draw(self, Path(path))


def plan(
    model: nn.Module | Callable[[], Any],
    *,
    batch: Any = None,
    optimizer: OptimizerMaker | None = None,
    precision: str | int = "32-true",
    ranks: int = 8,
    shard_size: int | None = None,
    memory: int | str | None = None,
    rows: Collection[str] = ROWS,
    checkpointing: bool | None = None,
    units: Units | None = None,
    bucket_cap_mb: float = 25.0,
    progress: Callable[[str, int, int], None] | None = None,
    processes: int = 1,
) -> Plan:
    """What one training step would allocate and send on each rank, under every row. Nothing is allocated for it.

    The engine itself runs, on tensors without memory and among ranks that are not there: two steps for each row. See
    docs/planning.md.

    Args:
        model: A module or LightningModule, with values or on the meta device; it stays as it is. Or a callable without
            arguments that makes one, or ``(module, batch)``: it is called with the meta device as torch's default.
        batch: What one rank gets in one step. Of its tensors only shapes and dtypes count, so they may be on the meta
            device. For a LightningModule as ``training_step`` takes it; for any other the arguments of ``forward`` (a
            tensor, or a tuple of them) or its keyword arguments (a mapping), and the loss is what forward returns, or
            ``.loss`` of it.
        optimizer: Makes the optimizer of the parameters: a class, or ``lambda parameters: ...``. By default the
            LightningModule's ``configure_optimizers``.
        precision: As Lightning names it.
        ranks: How many.
        shard_size: How many neighbouring ranks divide a copy under hybrid sharding; by default 8, the ranks of one
            machine.
        memory: What a rank has, in bytes or as ``"80GB"`` (decimal).
        rows: Names of rows. Hybrid sharding is left out where it would be full sharding.
        checkpointing: Whether the activations of blocks are computed again in backward; None: each row both ways.
        units: As for the strategies.
        bucket_cap_mb: As for the strategies.
        progress: Told, before each row is simulated, its name, how many are done and how many there are.
        processes: How many rows are simulated at once. More than one are forked from this process, so only where it
            has no other threads and has used no GPU.

    Raises:
        ValueError: If an argument contradicts another, or the model cannot be trained without values: its forward looks
            at them, it has no loss, no batch, no optimizer, or no parameters to train.
        TypeError: If ``model`` is none.

    """
    if ranks < 1:
        raise ValueError(f"Expected at least one rank, got {ranks}.")
    if isinstance(rows, str):
        raise ValueError(f"Expected `rows` to be a list of names, got {rows!r}. Put it in brackets.")
    if not rows:
        raise ValueError("Expected at least one row, got none.")
    found = [find_row(name.removeprefix("accel_")) for name in rows]
    if shard_size is not None and not any(row.hybrid for row in found):
        raise ValueError(f"Expected shard_size together with the row 'fsdp_hybrid', got {shard_size} without it.")
    size = min(RANKS_OF_NODE, ranks) if shard_size is None else shard_size
    if size < 1 or ranks % size:
        if shard_size is not None or list(rows) != list(ROWS):
            raise ValueError(f"Expected shard_size to divide the number of ranks, got {size} for {ranks} ranks.")
        size = ranks
    if size == ranks and len(found) > 1 and shard_size is None:
        found = [row for row in found if not row.hybrid]
    limit = None if memory is None else parse_size(memory)
    precise = Precision.of(precision)
    subject = Subject.of(model, batch, optimizer)
    blocks = find_blocks(subject.module, units)
    if checkpointing and not blocks:
        raise ValueError(
            "Expected the model to have repeated blocks (a ModuleList or Sequential of one class) for"
            " checkpointing=True, found none. Name them by units=..., or leave checkpointing out."
        )
    ways = [False, True] if checkpointing is None and blocks else [bool(checkpointing)]
    settings = [
        Setting(
            row=row,
            ranks=ranks,
            shard_size=size,
            precision=precise,
            checkpointing=way,
            units=units,
            bucket_cap_mb=bucket_cap_mb,
        )
        for row in found
        for way in ways
    ]
    planned = []
    with simulations(subject, settings, processes) as outcomes:
        for done, setting in enumerate(settings):
            if progress is not None:
                progress(f"accel_{setting.row.name}" + " + checkpointing" * setting.checkpointing, done, len(settings))
            planned.append(RowPlan.of(setting, next(outcomes)))
    return Plan(
        model=type(subject.module).__name__,
        parameters=sum(p.numel() for p in subject.module.parameters() if p.requires_grad),
        ranks=ranks,
        shard_size=size,
        precision=precise.name,
        memory=limit,
        rows=tuple(planned),
    )


def _shown(rows: Collection[RowPlan]) -> list[Kind]:
    """The kinds that any row has."""
    return [kind for kind in KINDS if any(row.peak[kind] for row in rows)]
