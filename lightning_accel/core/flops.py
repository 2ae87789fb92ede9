"""How many floating-point operations a step takes, by module.

[Note: counted as they run]
torch's counter sees the operations of forward and backward of one step, those that are computed again in backward
among them, and its table of formulas says how many floating-point operations each takes: matrix products,
convolutions and attention. Elementwise operations count for nothing. To count takes time, so it is the step after it
that is timed.

Of a whole model each rank counts what it does for its own samples. Where parameters rest sharded the same products are
computed, of gathered ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker
from typing_extensions import override

from lightning_accel.core.flops_table import Flops, ModuleFlops
from lightning_accel.core.times import BETWEEN, StopWatch
from lightning_accel.core.watching import BACKWARD, FORWARD, Watcher

if TYPE_CHECKING:
    from lightning_accel.core.engine import Engine

_ALL = "Global"
"""What torch's counter calls all modules together."""


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


_MISSING = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Attention on the CPU, which torch's table of formulas does not have: as many as elsewhere."""


class FlopCount(Watcher):
    """Counts one step of an engine, and times the next: ``engine.phases.add(FlopCount(engine, show))``.

    Args:
        engine: Whose step it is.
        show: Called with what was found, once: after the step that was timed, or when the engine is closed before. The
            times are missing then.
        after: How many optimizer steps to let pass before.

    Raises:
        ValueError: If that is negative.

    """

    def __init__(self, engine: Engine, show: Callable[[Flops], None], after: int = 0) -> None:
        if after < 0:
            raise ValueError(f"Expected after to be at least 0, got {after}.")
        self._engine = engine
        self._show = show
        self._step = after + 1
        self._steps = 0
        self._tracker: _Tracker | None = None
        self._open: list[str] = []
        self._found: dict[str, Counter[str]] = {FORWARD: Counter(), BACKWARD: Counter()}
        self._backwards = 0
        self._stop_watch: StopWatch | None = None

    @override
    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        with ExitStack() as stack:
            if self._stop_watch is not None:
                stack.enter_context(self._stop_watch.within(phase))
            elif self._steps == self._step - 1 and phase in self._found and torch.is_grad_enabled():
                stack.enter_context(self._counting(phase))
            yield

    @contextmanager
    def _counting(self, phase: str) -> Iterator[None]:
        if self._tracker is None:
            self._tracker = _Tracker(self._engine.module)
            self._tracker.start()
        counter = FlopCounterMode(display=False, custom_mapping=_MISSING)
        counter.mod_tracker = self._tracker
        self._open.append(phase)
        if phase == BACKWARD:
            self._backwards += 1
        try:
            with counter:
                yield
        finally:
            self._open.pop()
            counts = Counter({name: sum(of.values()) for name, of in counter.get_flop_counts().items()})
            self._found[phase].update(counts)
            if self._open:  # whose counter has seen the same operations
                self._found[self._open[-1]].subtract(counts)
            if not self._open and self._steps >= self._step:
                self._begin_timing()

    @override
    def begin_update(self) -> None:
        if self._stop_watch is not None:
            self._stop_watch.begin_update()

    @override
    def end_step(self) -> None:
        self._steps += 1
        if self._stop_watch is not None:
            self._stop_watch.end_step()
            if times := self._stop_watch.take():
                self._finish(times[0])
        elif self._steps == self._step and not self._open:  # else when the forward ends that this update is in
            self._begin_timing()

    @override
    def close(self) -> None:
        if self._tracker is not None:
            self._finish({})

    def _begin_timing(self) -> None:
        if self._tracker is not None:
            self._tracker.stop()
        self._stop_watch = StopWatch(self._engine.collectives.device)

    def _finish(self, times: dict[str, float]) -> None:
        engine, self._tracker = self._engine, None
        engine.phases.remove(self)
        forward, backward = self._found[FORWARD], self._found[BACKWARD]
        modules = [
            ModuleFlops(
                name=name,
                kind=type(module).__name__,
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                forward=forward[name or _ALL],
                backward=backward[name or _ALL],
            )
            for name, module in engine.module.named_modules()
        ]
        found = Flops(
            step=self._step,
            rank=engine.collectives.rank,
            ranks=engine.collectives.ranks,
            micro_batches=self._backwards,
            modules=modules,
            times_ms={phase: time for phase, time in times.items() if phase != BETWEEN},
        )
        self._show(found)


class _Tracker(ModuleTracker):
    """Knows in which modules the step is, by their names in the model, from its first forward to its last backward.

    A counter would start and stop its own with each forward and backward, and the latter has not seen the former.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._names: dict[nn.Module, str] = {module: name for name, module in root.named_modules()}

    def start(self) -> None:
        """Follow modules from now on."""
        super().__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Follow them no more."""
        super().__exit__()  # type: ignore[no-untyped-call]

    @override
    def __enter__(self) -> _Tracker:
        return self

    @override
    def __exit__(self, *args: Any) -> None:
        return

    @override
    def _get_mod_name(self, mod: nn.Module) -> str:
        # Torch's names begin with the class of whichever module is called first.
        return self._names.get(mod, "")
