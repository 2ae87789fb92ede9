"""The few collectives that the engine talks to, and how each back end carries them out. Counts what is sent.

Sizes and offsets follow a :class:`~lightning_accel.core.layout.Layout`: a buffer is cut into one part per rank, of
equal size or not, and every operation works **in place** on it.

[Note: one order]
Every rank starts operations in the same order. Point-to-point messages carry a tag that counts operations, so that a
rank which runs ahead never mixes two operations up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_accel.core.groups import group_beside
from lightning_accel.core.layout import Layout
from lightning_accel.core.phases import Phases


class Traffic:
    """What one rank sent: number of operations and bytes, by kind of operation."""

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()

    def add(self, kind: str, sent: int) -> None:
        """Count one operation that sends ``sent`` bytes from this rank."""
        self.operations[kind] += 1
        self.bytes_sent[kind] += sent

    def take(self) -> tuple[dict[str, int], dict[str, int]]:
        """Operations and bytes since the last call, and start anew."""
        taken = dict(self.operations), dict(self.bytes_sent)
        self.operations.clear()
        self.bytes_sent.clear()
        return taken


class Pending:
    """An operation under way. :meth:`wait` must be called once, in the order of launches."""

    def __init__(self, works: Sequence[Any], finish: Callable[[], None] | None = None) -> None:
        self._works = list(works)
        self._finish = finish

    def is_ready(self) -> bool:
        """Whether waiting for the phase that is under way would not block."""
        return all(work.is_completed() for work in self._works)

    def is_completed(self) -> bool:
        """:meth:`is_ready` by the name that torch's works give it: one may be made of others."""
        return self.is_ready()

    def advance(self) -> None:
        """Let an operation of several phases enter the next; others have none."""

    def wait(self) -> None:
        """Wait for the data (on CUDA: make the current stream wait) and do the local part of the operation."""
        for work in self._works:
            work.wait()
        self._works = []
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()


class TwoPhase(Pending):
    """An operation whose second half can only start when the first is done."""

    def __init__(self, first: Pending, second: Callable[[], Pending]) -> None:
        super().__init__([])
        self._first: Pending | None = first
        self._second = second
        self._started: Pending | None = None

    @override
    def is_ready(self) -> bool:
        """Whether waiting for the half that is under way would not block."""
        under_way = self._first or self._started
        return under_way is None or under_way.is_ready()

    @override
    def advance(self) -> None:
        """Wait for the first half and start the second; or let that enter its own next phase."""
        if self._first is not None:
            self._first.wait()
            self._first = None
            self._started = self._second()
        elif self._started is not None:
            self._started.advance()

    @override
    def wait(self) -> None:
        """Wait for both halves."""
        if self._first is not None:
            self.advance()
        assert self._started is not None
        self._started.wait()


class Agreement:
    """A comparison of flags between ranks that is under way.

    Args:
        ranks: Number of ranks.
        wait: Waits, and tells for each flag how many ranks have set it.

    """

    def __init__(self, ranks: int, wait: Callable[[], Sequence[int]]) -> None:
        self._ranks = ranks
        self._wait = wait

    def differing(self) -> list[int]:
        """Wait; positions of the flags that some ranks have set and others have not."""
        return [position for position, count in enumerate(self._wait()) if 0 < count < self._ranks]


@dataclass(frozen=True)
class Published:
    """A rank's part of a buffer that any rank may fetch."""

    part: Tensor
    addresses: Mapping[int, int] = field(default_factory=dict)
    """Where the other ranks have their parts, if they can be read there."""


class Collectives(ABC):
    """What the engine needs from a process group. All ranks of the group call the same methods in the same order."""

    is_one_sided = False
    """Whether ranks fetch what others have published without their help."""

    def __init__(
        self, device: torch.device, group: dist.ProcessGroup | None, control: dist.ProcessGroup | None
    ) -> None:
        self.device = device
        self.group = group
        self._control = control
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self.traffic = Traffic()
        self.phases = Phases(device, self.rank)
        """Of the engine that these belong to."""

    @abstractmethod
    def reduce_scatter(self, buffer: Tensor, layout: Layout, out: Tensor) -> Pending:
        """Add up the ranks' buffers; this rank's part of the sum lands in ``out``, which may be that part in place.

        Args:
            buffer: This rank's contribution, 1-D, ``layout.total`` elements. Its other parts stay as they are.
            layout: How the ranks divide the buffer.
            out: As many elements as this rank's part. It may be of a wider dtype: the ranks' contributions are added
                up in it.

        """

    @abstractmethod
    def all_gather(self, buffer: Tensor, layout: Layout) -> Pending:
        """Fill the other ranks' parts of ``buffer`` with what they have there; this rank's own part stays."""

    @abstractmethod
    def all_reduce(self, buffer: Tensor, layout: Layout) -> Pending:
        """Replace ``buffer`` by the sum over ranks: bit for bit the same on every rank."""

    def all_reduce_as(self, buffer: Tensor, wire: Tensor, layout: Layout) -> Pending:
        """As ``all_reduce``, of contributions that travel in another dtype than that of the sum.

        The sum is rounded to what travels as well. Here it is added up in that dtype, too: a back end's own all-reduce
        knows but one. See core/wire.py.

        Args:
            buffer: Where the sum goes, 1-D, ``layout.total`` elements.
            wire: This rank's contribution in the dtype that travels, as many elements. It is overwritten.
            layout: How the ranks divide the buffer.

        """

        def copy() -> None:
            buffer.copy_(wire)

        return Pending([self.all_reduce(wire, layout)], copy)

    @abstractmethod
    def gather(self, part: Tensor, layout: Layout, whole: Tensor | None) -> None:
        """Put the ranks' parts of a buffer together on rank 0. Waits.

        Args:
            part: This rank's, 1-D.
            layout: How the ranks divide the buffer.
            whole: On rank 0 where all of it goes, 1-D, ``layout.total`` elements; None on the others.

        """

    def all_reduce_after(self, first: Pending, buffer: Tensor, layout: Layout) -> Pending:
        """As ``all_reduce``, of what is in ``buffer`` when an operation that is under way has ended."""
        return TwoPhase(first, lambda: self.all_reduce(buffer, layout))

    def _count_gather(self, part: Tensor) -> None:
        self.traffic.add("gather", nbytes(part) if self.rank else 0)

    def publish(self, parts: Sequence[Tensor]) -> list[Published]:
        """Make known this rank's parts of buffers that will be fetched. All ranks publish theirs together.

        Args:
            parts: One for each buffer, 1-D. They keep their memory, and their values change between fences only.

        """
        return [Published(part) for part in parts]

    def fetch(self, source: Published, layout: Layout, buffer: Tensor) -> Pending:
        """Fill a whole buffer from the ranks' parts.

        Args:
            source: What was published of it.
            layout: How the ranks divide the buffer.
            buffer: Where all of it goes, 1-D, ``layout.total`` elements.

        """
        buffer[slice(*layout.part(self.rank))].copy_(source.part)
        return self.all_gather(buffer, layout)

    def fence(self, doing: str) -> Pending:
        """Call before and after this rank changes parts that it published. All ranks call it together.

        Args:
            doing: What is being done, for messages; the same on every rank.

        Returns:
            Wait for it before changing them; afterwards, whoever fetches waits for it.

        """
        return Pending([])

    def linger(self, seconds: float) -> None:
        """Wait, at most so long, until nobody fetches what this rank published: the others wait here, too."""
        return

    def trim(self) -> None:
        """Free memory that is kept for later operations. None that needs it may be under way."""
        return

    def close(self) -> None:
        """Free what belongs to this object only; the process group still works. Nothing may be under way."""
        return

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite ``tensor`` (any shape, contiguous) with that of rank ``source`` of the group. Waits."""
        if self.ranks == 1 or tensor.numel() == 0:
            return
        self.traffic.add("broadcast", nbytes(tensor) if self.rank == source else 0)
        dist.broadcast(real(tensor), group=self.group, group_src=source)

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether any rank has set it. Waits."""
        if self.ranks == 1:
            return list(flags)
        message = torch.tensor(flags, dtype=torch.uint8)
        self.traffic.add("agree", ring(nbytes(message), self.ranks, passes=2))
        dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self._control)
        return [bool(flag) for flag in message.tolist()]

    def start_agreement(self, flags: Sequence[bool]) -> Agreement:
        """Start to compare flags with the other ranks."""
        if self.ranks == 1:
            return Agreement(1, lambda: [])
        counts = torch.tensor(flags, dtype=torch.int32)
        self.traffic.add("agree", ring(nbytes(counts), self.ranks, passes=2))
        work = dist.all_reduce(counts, group=self._control, async_op=True)

        def wait() -> list[int]:
            work.wait()
            found: list[int] = counts.tolist()
            return found

        return Agreement(self.ranks, wait)

    def sum_scalar(self, value: Tensor, *, maximum: bool = False) -> Tensor:
        """Sum (or maximum) of a few numbers over ranks, element by element, in place. Waits."""
        if self.ranks > 1:
            self.traffic.add("scalar", ring(nbytes(value), self.ranks, passes=2))
            dist.all_reduce(value, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=self.group)
        return value

    def beside(self) -> dist.ProcessGroup:
        """A group of the same ranks for messages of the host. All of them make it together."""
        return group_beside(self.group, self.device)

    def gather_numbers(self, number: int, group: dist.ProcessGroup) -> list[int]:
        """A number of 64 bits of every rank, by rank, over a group that ``beside`` made. Waits."""
        mine = torch.tensor([number])
        self.traffic.add("agree", mine.nbytes * (self.ranks - 1))
        numbers = [torch.zeros_like(mine) for _ in range(self.ranks)]
        dist.all_gather(numbers, mine, group=group)
        return [int(one.item()) for one in numbers]

    def gather_objects(self, value: Any) -> list[Any]:
        """A small picklable object of every rank, by rank. For set-up and checkpoints, not for steps."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self._control)
        return values


def nbytes(tensor: Tensor) -> int:
    """Size of a tensor's elements in bytes."""
    return tensor.numel() * tensor.element_size()


def add_first(own: Tensor, other: Tensor, out: Tensor) -> None:
    """``out = own + other``, added up in the dtype of ``out``."""
    if out.dtype == own.dtype:
        torch.add(own, other, out=out)
    else:
        out.copy_(own).add_(other)


def real(tensor: Tensor) -> Tensor:
    """A tensor that every back end knows: complex numbers as pairs."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def sent_scattering(buffer: Tensor, layout: Layout, rank: int) -> int:
    """Bytes of all parts but this rank's own."""
    start, stop = layout.part(rank)
    return (layout.total - (stop - start)) * buffer.element_size()


def sent_gathering(buffer: Tensor, layout: Layout, rank: int) -> int:
    """Bytes of this rank's part, once to each other rank."""
    start, stop = layout.part(rank)
    return (layout.ranks - 1) * (stop - start) * buffer.element_size()


def sent_reducing(buffer: Tensor, layout: Layout, rank: int) -> int:
    """Bytes of a reduction to parts and of gathering them."""
    return sent_scattering(buffer, layout, rank) + sent_gathering(buffer, layout, rank)


def ring(size: int, ranks: int, passes: int) -> int:
    """Bytes that one rank sends of ``size`` bytes that go round a ring of all ranks ``passes`` times."""
    return passes * size * (ranks - 1) // ranks
