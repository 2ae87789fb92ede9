"""What an engine is doing, for those who watch it: stop-watches, counters of operations.

Nobody does by default, and then a phase costs the look whether somebody does. One may be within another: an update of
``training_step`` within its forward, or a wait for parameters within either.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lightning_accel.core.module_hook import Hook
from lightning_accel.core.times import StepTimes, StopWatch, slowest
from lightning_accel.core.watching import FORWARD, Watcher

_NOTHING: AbstractContextManager[None] = nullcontext()


class Phases:
    """The phases of an engine's steps, and who watches them.

    Args:
        device: Where the engine's model is.
        rank: Of this process.

    """

    def __init__(self, device: torch.device, rank: int) -> None:
        self._device = device
        self._rank = rank
        self._watchers: tuple[Watcher, ...] = ()
        self._stop_watch: StopWatch | None = None
        self._module: weakref.ref[nn.Module] | None = None
        self._hooks: list[Any] = []
        self._forwards: list[AbstractContextManager[None]] = []  # of calls of the module that are under way

    def follow(self, module: nn.Module) -> None:
        """Take each call of a module for a forward, while somebody watches."""
        self._module = weakref.ref(module)

    # ------------------------------------------------------------- for users

    def time_steps(self, on: bool = True) -> None:
        """Have the engine's report tell where the time of steps goes, from the next forward on; or have it end.

        On CUDA, events on the stream tell the time: nothing is waited for in a step.

        Args:
            on: Whether to, the same on every rank.

        """
        if on and self._stop_watch is None:
            self._stop_watch = StopWatch(self._device)
            self.add(self._stop_watch)
        elif not on and self._stop_watch is not None:
            self.remove(self._stop_watch)
            self._stop_watch = None

    def times(
        self, gather: Callable[[StepTimes | None], list[StepTimes | None]] | None
    ) -> tuple[StepTimes | None, StepTimes | None]:
        """Times of the steps since the last call.

        Args:
            gather: Gives the times of all ranks, by rank; None if only this one asks.

        Returns:
            This rank's, and those of the slowest; None where there are none.

        """
        if self._stop_watch is None:
            return None, None
        steps = self._stop_watch.take()
        mine = StepTimes.of(self._rank, steps) if steps else None
        everyone = [] if gather is None else [times for times in gather(mine) if times is not None]
        return mine, slowest(everyone) if everyone else None

    def add(self, watcher: Watcher) -> None:
        """Tell a watcher of phases from now on."""
        module = None if self._module is None else self._module()
        if not self._hooks and module is not None:
            self._hooks = [
                module.register_forward_pre_hook(Hook(self._enter_module), prepend=True),
                module.register_forward_hook(Hook(self._leave_module), always_call=True),
            ]
        self._watchers += (watcher,)

    def remove(self, watcher: Watcher) -> None:
        """Tell it of no more."""
        self._watchers = tuple(other for other in self._watchers if other is not watcher)
        self._tidy()

    def _tidy(self) -> None:
        if not self._watchers and not self._forwards:
            while self._hooks:
                self._hooks.pop().remove()

    def close(self) -> None:
        """Tell nobody of anything any more."""
        for watcher in self._watchers:
            watcher.close()
            self.remove(watcher)
        self._stop_watch = None

    # --------------------------------------------------------- for the engine

    def within(self, phase: str) -> AbstractContextManager[None]:
        """Around what belongs to a phase."""
        return self._within(phase) if self._watchers else _NOTHING

    @contextmanager
    def _within(self, phase: str) -> Iterator[None]:
        with ExitStack() as stack:
            for watcher in self._watchers:
                stack.enter_context(watcher.within(phase))
            yield

    def begin_update(self) -> None:
        """Call before an optimizer updates parameters; ``end_step`` follows, unless the update fails."""
        for watcher in self._watchers:
            watcher.begin_update()

    def end_step(self) -> None:
        """Call after each optimizer step."""
        for watcher in self._watchers:
            watcher.end_step()

    def _enter_module(self, *_: Any) -> None:
        forward = self.within(FORWARD)
        forward.__enter__()
        self._forwards.append(forward)

    def _leave_module(self, *_: Any) -> None:
        if self._forwards:  # else the hooks came in the middle of a call
            self._forwards.pop().__exit__(None, None, None)
            self._tidy()  # the last watcher may have gone in it
