"""The bytes that the tensors of a rank take, from each allocation of a step to the next.

[Note: memory timeline] Every allocation and release that torch's CPU allocator makes in any thread of the process, in
order, as torch's profiler records them; nothing is sampled, so no peak is missed. They are added to the bytes that are
alive at the step's start, found by the walk over all tensors that gives the bytes at rest. What comes from elsewhere
than the allocator (our engine maps large buffers of rows that rest replicated into huge pages itself) is part of that
walk, and has to stay throughout the step. A second walk at the step's end says whether it did: what the two walks and
the allocator's record disagree by is kept as `unexplained`. Memory that only gloo or the kernel uses is not seen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

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
        for time, change in sorted(changes, key=lambda item: item[0]):
            moments.append(min(max((time - start) / (end - start), 0.0), 1.0))
            sizes.append(sizes[-1] + change)
        begins = [(name, (time - start) / (end - start)) for name, time in phases]
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


class Recorder:
    """Held around one step of a peer, it leaves the `timeline`. See [Note: memory timeline].

    Args:
        peer: Drives its own loop: forward, `Peer.backward`, and after the last one the optimizer.
    """

    timeline: Timeline

    def __init__(self, peer: "Peer") -> None:
        self._peer = peer

    def __enter__(self) -> "Recorder":
        peer, backward = self._peer, self._peer.backward

        def marked(loss: torch.Tensor) -> None:
            with torch.profiler.record_function(_MARK + "backward"):
                backward(loss)

        peer.backward = marked  # type: ignore[method-assign]
        self._resting = sum(peer.count().values())
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU],
            profile_memory=True,
            # The threads that reduce take memory too.
            experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
        )
        self._profile.__enter__()
        self._step = torch.profiler.record_function(_MARK + "step")
        self._step.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._step.__exit__(None, None, None)
        self._profile.__exit__(None, None, None)
        del self._peer.backward  # the class's own again
        changes, backwards, step = [], [], None
        results: Any = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        for event in results.events():
            if event.name() == "[memory]":
                changes.append((event.start_ns(), event.nbytes()))
            elif event.name() == _MARK + "backward":
                backwards.append((event.start_ns(), event.end_ns()))
            elif event.name() == _MARK + "step":
                step = event.start_ns(), event.end_ns()
        assert step is not None
        phases = [("forward", step[0])]
        for index, (start, end) in enumerate(backwards, 1):
            phases += [("backward", start), ("optimizer" if index == len(backwards) else "forward", end)]
        rested = sum(self._peer.count().values())
        self.timeline = Timeline.of(self._resting, changes, phases, end=step[1], rested=rested)
