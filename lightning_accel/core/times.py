"""Where the time of steps goes.

[Note: one phase at a time]
Each moment belongs to one phase: the innermost that the engine is in, so that phases add up to the step. A step ends
with the optimizer's, and the time from there to the next forward (reading data, logging, evaluation) is the next
step's, as ``between``; what else is in none is ``other``: a loss outside of the model, clipping, callbacks.

[Note: time on a stream]
On CUDA the host runs ahead, and its clock says little. There each change of phase is an event on the current stream,
and phases last from event to event: a wait for a collective is as long as the stream stands still for it. An event
is looked at one step later, when it has long passed; nothing else waits for the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from typing_extensions import override

from lightning_accel.core.watching import BACKWARD, FORWARD, GRADIENTS, PARAMETERS, UPDATE, Watcher

BETWEEN, OTHER, TOTAL = "between", "other", "total"
PHASES = (FORWARD, BACKWARD, GRADIENTS, PARAMETERS, UPDATE, OTHER, BETWEEN)
LABELS = {
    GRADIENTS: "gradients waited for",
    PARAMETERS: "parameters waited for",
    UPDATE: "optimizer step",
    OTHER: "rest of the step",
    BETWEEN: "between steps",
}
"""What phases are called in the report, if not by their names."""
_KEPT = 10_000
"""Steps of which times are kept between reports: the last ones."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Times of one rank's steps in milliseconds, by phase: those of ``PHASES``, and ``total``.

    The means of the phases add up to the mean total. Medians do not.
    """

    rank: int
    steps: int
    """How many steps they are of."""
    mean_ms: dict[str, float]
    median_ms: dict[str, float]

    @staticmethod
    def of(rank: int, steps: Sequence[dict[str, float]]) -> StepTimes:
        """The times of some steps, at least one."""
        lists = {phase: [step[phase] for step in steps] for phase in PHASES}
        lists[TOTAL] = [sum(step.values()) for step in steps]
        return StepTimes(
            rank=rank,
            steps=len(steps),
            mean_ms={phase: fmean(values) for phase, values in lists.items()},
            median_ms={phase: median(values) for phase, values in lists.items()},
        )

    @property
    def busy_ms(self) -> float:
        """The mean total without waits for other ranks."""
        return self.mean_ms[TOTAL] - self.mean_ms[GRADIENTS] - self.mean_ms[PARAMETERS]


def slowest(ranks: Sequence[StepTimes]) -> StepTimes:
    """The rank that the others wait for: it waits least itself, where their steps take the same time."""
    return max(ranks, key=lambda times: times.busy_ms)


def describe(times: StepTimes, other: StepTimes | None) -> list[str]:
    """Lines of a table.

    Args:
        times: Of this rank.
        other: Of the slowest one.

    """
    columns = [times.mean_ms, times.median_ms]
    title = f"  {f'ms in each of {times.steps} steps':<32}{'mean':>10}{'median':>10}"
    if other is not None:
        columns += [other.mean_ms, other.median_ms]
        title += f"   rank {other.rank}, the slowest:{'mean':>10}{'median':>10}"
    width = len(title) - 20
    lines = [title]
    for phase in (*PHASES, TOTAL):
        cells = [f"{column[phase]:>10.2f}" for column in columns]
        line = f"    {LABELS.get(phase, phase):<30}" + "".join(cells[:2])
        lines.append(line if other is None else f"{line:<{width}}" + "".join(cells[2:]))
    return lines


class StopWatch(Watcher):
    """Times an engine's steps. See [Note: one phase at a time].

    Args:
        device: Where the engine's model is.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._now: Callable[[], Any] = time.perf_counter if device.type == "cpu" else self._event
        self._stack: list[str] = []
        self._is_in_step = False
        self._marks: list[tuple[str, Any]] = []  # the phases of the step that runs, and when each began
        self._unread: list[list[tuple[str, Any]]] = []
        self._steps: deque[dict[str, float]] = deque(maxlen=_KEPT)

    def _event(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def take(self) -> list[dict[str, float]]:
        """Milliseconds of each phase, for each step since the last call."""
        self._read(all_steps=True)
        steps = list(self._steps)
        self._steps.clear()
        return steps

    @override
    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        if not self._is_in_step and not (phase in (FORWARD, BACKWARD) and torch.is_grad_enabled()):
            yield  # evaluation, say
            return
        self._is_in_step = True
        depth = len(self._stack)
        self._stack.append(phase)
        self._mark()
        try:
            yield
        finally:
            del self._stack[depth:]  # an update that failed may be there, too
            self._mark()

    @override
    def begin_update(self) -> None:
        if self._stack[-1:] != [UPDATE]:  # a closure may be evaluated several times in one
            self._is_in_step = True
            self._stack.append(UPDATE)
            self._mark()

    @override
    def end_step(self) -> None:
        if self._stack[-1:] == [UPDATE]:
            self._stack.pop()
        self._is_in_step = bool(self._stack)  # the next one has begun, if this is within a forward
        self._mark()
        if len(self._marks) > 1:
            self._unread.append(self._marks)
            self._marks = self._marks[-1:]
        self._read(all_steps=False)

    def _mark(self) -> None:
        phase = self._stack[-1] if self._stack else OTHER if self._is_in_step else BETWEEN
        self._marks.append((phase, self._now()))

    def _read(self, *, all_steps: bool) -> None:
        """Look at the times of steps that are over; on CUDA of all but the last one, which may still run."""
        on_cpu = self._device.type == "cpu"
        while len(self._unread) > (0 if all_steps or on_cpu else 1):
            marks = self._unread.pop(0)
            if not on_cpu:
                marks[-1][1].synchronize()
            step = dict.fromkeys(PHASES, 0.0)
            for (phase, begin), (_, end) in zip(marks, marks[1:], strict=False):
                step[phase] += (end - begin) * 1e3 if on_cpu else begin.elapsed_time(end)
            self._steps.append(step)
