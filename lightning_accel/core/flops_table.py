"""What was counted in a step, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_accel.core.watching import BACKWARD, FORWARD

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


@dataclass(frozen=True, kw_only=True)
class ModuleFlops:
    """Floating-point operations of one module in a step, those of its submodules included."""

    name: str
    """In the model; empty for the model itself, which has all that the step does, also outside of its modules."""
    kind: str
    """The class."""
    parameters: int
    """Elements of its parameters, whole ones."""
    forward: int
    backward: int
    """What is computed again in backward included."""

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def depth(self) -> int:
        """0 for the model, 1 for its members, and so on."""
        return self.name.count(".") + 1 if self.name else 0


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of one step on one rank, by module; ``str()`` of it is a table."""

    step: int
    rank: int
    ranks: int
    micro_batches: int
    """How many backwards the step had."""
    modules: Sequence[ModuleFlops]
    """The model first, then its modules, each before its members."""
    times_ms: dict[str, float]
    """Of the step after it, by phase, without what is between steps; empty if there was none."""

    @property
    def model(self) -> ModuleFlops:
        """All of the step."""
        return self.modules[0]

    @property
    def per_second(self) -> dict[str, float]:
        """Operations per second that this rank has reached: in ``forward``, ``backward``, and the whole ``step``."""
        if not self.times_ms:
            return {}
        spent = {
            "forward": (self.model.forward, self.times_ms[FORWARD]),
            "backward": (self.model.backward, self.times_ms[BACKWARD]),
            "step": (self.model.total, sum(self.times_ms.values())),
        }
        return {phase: 1e3 * count / time for phase, (count, time) in spent.items() if time > 0}

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def table(self, *, depth: int = -1, top: int = 1, detailed: bool = True) -> str:
        """What there is to be shown.

        Args:
            depth: Of the innermost modules that are listed; -1 for all.
            top: How many modules of each depth are named that take most.
            detailed: Whether to list modules one by one.

        """
        model = self.model
        lines = [
            f"floating-point operations of step {self.step}, rank {self.rank} of {self.ranks}:"
            f" its own samples, {self.micro_batches} micro-batches",
            f"  {'parameters':<12}{_short(model.parameters):>10}",
        ]
        speeds, spent = self.per_second, {**self.times_ms, "step": sum(self.times_ms.values())}
        for phase, count in (("forward", model.forward), ("backward", model.backward), ("step", model.total)):
            speed = ""
            if phase in speeds:
                speed = f" in {spent[phase]:.2f} ms: {_short(speeds[phase])}FLOPS"
            lines.append(f"  {phase:<12}{_short(count):>10}{speed}")
        if speeds:
            lines.append(
                f"  (times of step {self.step + 1}, which was not counted; forward and backward without waits)"
            )
        limit = max((module.depth for module in self.modules), default=0) if depth < 0 else depth
        lines.append(f"  the largest {top} of each depth")
        for level in range(limit + 1):
            those = sorted((m for m in self.modules if m.depth == level), key=lambda m: m.total, reverse=True)
            names = ", ".join(
                f"{m.name or m.kind} {_short(m.total).strip()} ({_short(m.parameters).strip()} parameters)"
                for m in those[:top]
            )
            if names:
                lines.append(f"    {level}: {names}")
        if detailed:
            lines += self._modules([module for module in self.modules if module.depth <= limit])
        return "\n".join(lines)

    def _modules(self, modules: Sequence[ModuleFlops]) -> list[str]:
        titles = [
            f"{'  ' * m.depth}{m.name.rpartition('.')[2] or m.kind}" + f" ({m.kind})" * bool(m.name) for m in modules
        ]
        width = max(map(len, [*titles, "module"])) + 2
        lines = [f"  {'module':<{width}}{'parameters':>12}{'forward':>12}{'backward':>12}{'share':>9}"]
        for title, m in zip(titles, modules, strict=True):
            share = m.total / self.model.total if self.model.total else 0.0
            lines.append(
                f"  {title:<{width}}{_short(m.parameters):>12}{_short(m.forward):>12}{_short(m.backward):>12}"
                f"{share:>9.1%}"
            )
        return lines

    def __str__(self) -> str:
        return self.table()


def _short(count: float) -> str:
    """Three digits or more, and the letter of what they are of, if any: ``"1.23 G"``, ``"12 "``."""
    for size, letter in _UNITS:
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return f"{count:.0f} "
