"""What the engine really allocated, sent and copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_accel.core.collectives import nbytes
from lightning_accel.core.offload import is_in_file
from lightning_accel.core.times import StepTimes, describe

if TYPE_CHECKING:
    from lightning_accel.core.engine import Engine
    from lightning_accel.core.unit import Unit


@dataclass(frozen=True, kw_only=True)
class Report:
    """Bytes of this rank by kind of state, and what its last optimizer step sent and copied."""

    row: str
    """Name of the placement row."""
    rank: int
    world_size: int
    shard_size: int
    """How many ranks divide the model state: all but for hybrid rows."""
    at_rest: dict[str, int]
    """Bytes kept between steps: ``parameters`` (what the model computes with), in mixed precision also
    ``master_parameters`` (what the optimizer updates), ``gradients``, ``optimizer_state`` (of trainable parameters,
    padding included), ``frozen_parameters``, ``buffers``; with ``offload_dir`` ``optimizer_state_in_files``, which are
    not in memory; with PowerSGD ``gradient_compression``: what it left out so far, and its directions."""
    padding: dict[str, int]
    """Of those, bytes that belong to no parameter: ``parameters``, ``gradients``."""
    transient: int
    """Most bytes of gradient buffers that were borrowed at once and given back before the step's end."""
    gathered: int
    """Most bytes of whole parameters that were gathered at once, in rows whose parameters rest sharded."""
    steps: int
    """Optimizer steps so far."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Number of operations of the last step, by kind. ``agree`` is the message about used parameters."""
    bytes_sent: dict[str, int] = field(default_factory=dict)
    """Bytes this rank sent in the last step, by kind of operation."""
    copies: dict[str, int] = field(default_factory=dict)
    """Copies of the last step outside of collectives: ``gradient_writes`` (one for each arriving gradient)."""
    times: StepTimes | None = None
    """Where the time of this rank's steps went since the last report; None if nobody has asked for it, or there were
    none."""
    slowest: StepTimes | None = None
    """The same of the rank that the others wait for, if all ranks have asked."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        ranks = f"rank {self.rank} of {self.world_size}" + f" ({self.shard_size} divide a copy)" * (
            self.shard_size < self.world_size
        )
        lines = [f"accel_{self.row}, {ranks}, after {self.steps} optimizer steps"]
        lines.append(f"  {'bytes at rest':<24}{'bytes':>16}{'':>12}")
        for kind, size in self.at_rest.items():
            pad = self.padding.get(kind, 0)
            lines.append(
                f"    {kind.replace('_', ' '):<22}{size:>16,}{_human(size):>12}" + f"  ({pad:,} padding)" * bool(pad)
            )
        total = sum(self.at_rest.values())
        lines.append(f"    {'total':<22}{total:>16,}{_human(total):>12}")
        lines.append(f"    {'borrowed at most':<22}{self.transient:>16,}{_human(self.transient):>12}")
        if self.gathered:
            lines.append(f"    {'gathered at most':<22}{self.gathered:>16,}{_human(self.gathered):>12}")
        lines.append(f"  {'sent in the last step':<24}{'bytes':>16}{'':>12}  operations")
        for kind, size in self.bytes_sent.items():
            lines.append(
                f"    {kind.replace('_', ' '):<22}{size:>16,}{_human(size):>12}  {self.collectives.get(kind, 0):>10}"
            )
        for kind, count in self.copies.items():
            lines.append(f"  {kind.replace('_', ' ')}: {count}")
        if self.times is not None:
            lines += describe(self.times, self.slowest)
        return "\n".join(lines)


class StepCounts:
    """Counts of the last optimizer step, and how many there were."""

    def __init__(self) -> None:
        self.steps = 0
        self.collectives: dict[str, int] = {}
        self.bytes_sent: dict[str, int] = {}
        self.copies: dict[str, int] = {}

    def close_step(self, engine: Engine) -> None:
        """Take what was counted since the last step as this step's."""
        self.steps += 1
        engine.phases.end_step()
        self.collectives, self.bytes_sent = engine.collectives.traffic.take()
        self.copies = {"gradient_writes": sum(unit.writes for unit in engine.units)}
        for unit in engine.units:
            unit.writes = 0


def measure(
    engine: Engine,
    counts: StepCounts,
    transient: int,
    gathered: int,
    times: StepTimes | None,
    slowest: StepTimes | None,
) -> Report:
    """The report of an engine, from the memory it really holds."""
    module = engine.module
    trained = [unit for unit in engine.units if any(p.requires_grad for p in unit.parameters)]
    frozen = [unit.memory.resting for unit in engine.units if unit not in trained]
    gradients = [unit.grad if unit.grad is not None else unit.rest for unit in engine.units]
    ours = {p for unit in engine.units for p in unit.parameters}
    state = [value for o in engine.optimizers for values in o.optimizer.state.values() for value in _tensors(values)]
    masters = _bytes([unit.memory.mine for unit in engine.units if unit.memory.has_master])
    compressed = 0 if engine.compression is None else _bytes(engine.compression.tensors())
    in_files = _bytes([value for value in state if is_in_file(value)])
    return Report(
        row=engine.row.name,
        rank=engine.collectives.rank,
        world_size=engine.collectives.ranks,
        shard_size=engine.mesh.shard.ranks,
        at_rest={
            "parameters": _bytes([unit.memory.resting for unit in trained]),
            **({"master_parameters": masters} if masters else {}),
            "gradients": _bytes([g for g in gradients if g is not None]),
            **({"gradient_compression": compressed} if compressed else {}),
            "optimizer_state": _bytes([value for value in state if not is_in_file(value)]),
            **({"optimizer_state_in_files": in_files} if in_files else {}),
            "frozen_parameters": _bytes([p for p in module.parameters() if p not in ours]) + _bytes(frozen),
            "buffers": _bytes(list(module.buffers())),
        },
        padding={
            "parameters": sum(_padding(unit, unit.memory.is_sharded) * unit.flat.element_size() for unit in trained),
            "gradients": sum(
                unit.gradient_padding * gradient.element_size()
                for unit, gradient in zip(engine.units, gradients, strict=True)
                if gradient is not None
            ),
        },
        transient=transient,
        gathered=gathered,
        steps=counts.steps,
        collectives=dict(counts.collectives),
        bytes_sent=dict(counts.bytes_sent),
        copies=dict(counts.copies),
        times=times,
        slowest=slowest,
    )


def _padding(unit: Unit, sharded: bool) -> int:
    """Elements of a unit's buffer, or of this rank's part of it, that belong to no parameter."""
    start, stop = unit.part if sharded else (0, unit.layout.total)
    return stop - start - sum(piece.stop - piece.start for piece in unit.layout.pieces(start, stop))


def _tensors(values: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in values.values() if isinstance(value, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(map(nbytes, tensors))


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
