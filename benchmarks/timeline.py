"""The bytes that the tensors of a rank take, from each allocation of a step to the next.

[Note: memory timeline] Every allocation and release of torch's CPU allocator, in order, as torch's profiler records
them: nothing is sampled, so no peak is missed. That holds for the copies that torch makes for gloo as well. They are
added to the bytes that are alive at the step's start, found by the walk over all tensors that gives the bytes at rest.

The profiler does not follow our engine's own threads; the only memory they take, receive buffers of reductions, is
noted where they take it. What does not come from the allocator (our engine maps large buffers of rows that rest
replicated into huge pages itself) is part of the walk, and has to stay throughout the step. A second walk at the step's
end says whether it did: what the two walks and the record between them disagree by is kept as `unexplained`. Memory
that never belongs to a tensor (gloo's, the kernel's) is not seen.
"""

import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.measure import QUIET_SECONDS

if TYPE_CHECKING:
    from benchmarks.peers.base import Peer

PHASES = ("forward", "backward", "optimizer")
"""The phases of a step, in order; with micro-batches the first two take turns."""

_MARK = "benchmarks::"


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The live bytes of one rank through one step."""

    moments: list[float]
    """When the bytes changed, as fractions of the step, ascending; the first is 0."""
    sizes: list[int]
    """The bytes from each moment on."""
    phases: list[tuple[str, float]]
    """The phases and where they begin, as fractions of the step."""
    unexplained: int
    """See [Note: memory timeline]."""

    @classmethod
    def of(
        cls,
        resting: int,
        changes: Iterable[tuple[int, int]],
        phases: Sequence[tuple[str, int]],
        *,
        end: int,
        rested: int,
    ) -> "Timeline":
        """The timeline of a step.

        Args:
            resting: The bytes at its start.
            changes: Times and the bytes taken (or, if negative, freed) then, in any order.
            phases: The phases and when they begin, in order; the step starts with the first.
            end: When the step ends.
            rested: The bytes then, as found without the changes.
        """
        start = phases[0][1]
        moments, sizes = [0.0], [resting]
        for when, change in sorted(changes, key=lambda item: item[0]):
            moments.append((when - start) / (end - start))
            sizes.append(sizes[-1] + change)
        begins = [(name, (when - start) / (end - start)) for name, when in phases]
        return cls(moments=moments, sizes=sizes, phases=begins, unexplained=rested - sizes[-1])

    @property
    def resting(self) -> int:
        """The bytes at the step's start, which the last step has left: its gradients included."""
        return self.sizes[0]

    @property
    def peak(self) -> int:
        """The most bytes at any moment."""
        return max(self.sizes)

    def peak_of(self, phase: str) -> int:
        """The most bytes at any moment of a phase, those at its start included."""
        most = 0
        ends = [start for _, start in self.phases[1:]] + [float("inf")]
        for (name, start), end in zip(self.phases, ends, strict=True):
            if name == phase:
                before = [size for moment, size in zip(self.moments, self.sizes, strict=True) if moment <= start]
                within = [size for moment, size in zip(self.moments, self.sizes, strict=True) if start < moment < end]
                most = max(most, before[-1], *within)
        return most


def allocator_peak(peer: "Peer") -> int | None:
    """The most bytes that the tensors of this rank have at any moment of a step, or None if that cannot be recorded.

    On a GPU that is what its allocator says of a lead-in step and one more.
    """
    if torch.cuda.is_initialized() and torch.cuda.memory_allocated():
        torch.cuda.reset_peak_memory_stats()
        peer.run(1)
        return torch.cuda.max_memory_allocated()
    if not peer.has_phases:
        return None
    recorder = Recorder(peer)
    recorder.run()
    return recorder.timeline.peak


class Recorder:
    """Has a peer train a lead-in step and one more, and leaves the `timeline` of that. See [Note: memory timeline].

    Args:
        peer: Drives its own loop: forward, `Peer.backward`, and after the last one the optimizer.
    """

    timeline: Timeline

    def __init__(self, peer: "Peer") -> None:
        self._peer = peer
        self._changes: list[tuple[int, int]] = []

    def run(self) -> None:
        """Train the two steps."""
        peer, backward = self._peer, self._peer.backward

        def marked(loss: torch.Tensor) -> None:
            with torch.profiler.record_function(_MARK + "backward"):
                backward(loss)

        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile, self._other_threads():
            peer.step()  # the allocator tells of a release only if it has told of the allocation
            resting = sum(peer.count().values())
            peer.backward = marked  # type: ignore[method-assign]
            with torch.profiler.record_function(_MARK + "step"):
                peer.step()
            del peer.backward  # the class's own again
            rested = sum(peer.count().values())
            # A thread that is within a collective as torch's profiler stops ends the process (torch 2.13).
            peer.settle()
            dist.barrier()
            time.sleep(QUIET_SECONDS)
        backwards, step = [], (0, 0)
        results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
        for event in results.events():
            if event.name() == "[memory]":
                self._changes.append((event.start_ns(), event.nbytes()))
            elif event.name() == _MARK + "backward":
                backwards.append((event.start_ns(), event.end_ns()))
            elif event.name() == _MARK + "step":
                step = event.start_ns(), event.end_ns()
        phases = [("forward", step[0])]
        for index, (start, end) in enumerate(sorted(backwards), 1):
            phases += [("backward", start), ("optimizer" if index == len(backwards) else "forward", end)]
        changes = [(when, change) for when, change in self._changes if step[0] <= when <= step[1]]
        self.timeline = Timeline.of(resting, changes, phases, end=step[1], rested=rested)

    @contextmanager
    def _other_threads(self) -> Iterator[None]:
        """Within it, what our engine's threads take is noted too: the receive buffers of reductions."""
        gloo = sys.modules.get("lightning_accel.core.gloo")
        if gloo is None:
            yield
            return
        borrow = gloo.GlooCollectives._borrow

        def noted(owner: Any, numel: int, like: torch.Tensor) -> torch.Tensor:
            before = {id(kept) for kept in owner._scratch}
            buffer: torch.Tensor = borrow(owner, numel, like)
            if id(buffer) not in before and threading.current_thread() is not threading.main_thread():
                self._note(buffer.nbytes)
                weakref.finalize(buffer, self._note, -buffer.nbytes)
            return buffer

        with mock.patch.object(gloo.GlooCollectives, "_borrow", noted):
            yield

    def _note(self, change: int) -> None:
        self._changes.append((time.time_ns(), change))
