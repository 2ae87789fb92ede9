"""The few collectives that the engine talks to, and how each back end carries them out. Counts what is sent.

Sizes and offsets follow a :class:`~lightning_accel.core.layout.Layout`: a buffer is cut into one part per rank, of
equal size or not, and every operation works **in place** on it.

[Note: gloo point to point]
gloo's own ``reduce_scatter`` and ``all_gather`` copy into and out of staging tensors. Sending each part straight to
the rank that keeps it, and adding up on arrival, moves the same bytes with no copy. Measured with 2 ranks on 2 cores
and 32 MB of fp32: reduce-scatter 47 ms by gloo's own, 17 ms by all-to-all, 13 ms point to point; all-gather 35 ms, 11
ms, 12 ms; all-reduce 24 ms by gloo's own, 23 ms as the two point-to-point halves. Point to point also takes any number
of ranks, parts of different sizes, and needs no send buffer.

[Note: one order]
Every rank starts operations in the same order. Point-to-point messages carry a tag that counts operations, so that a
rank which runs ahead never mixes two operations up.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_accel.core.layout import Layout

_TAGS = 1 << 20
"""Tags wrap around here; far fewer operations are ever under way at once."""
_OWNERS = 1 << 10
_PAUSE_S = 0.05
"""Between two looks at whether the other ranks have come."""
_numbers = itertools.count()
"""Numbers of the objects below: the messages of two engines on one process group must not be taken for each other's."""


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


class Agreement:
    """A comparison of flags between ranks that is under way.

    Args:
        counts: For each flag, how many ranks have set it, once the work is done.
        ranks: Number of ranks.
        work: The reduction of the counts.

    """

    def __init__(self, counts: Tensor, ranks: int, work: Any) -> None:
        self._counts = counts
        self._ranks = ranks
        self._work = work

    def differing(self) -> list[int]:
        """Wait; positions of the flags that some ranks have set and others have not."""
        if self._work is not None:
            self._work.wait()
        return [position for position, count in enumerate(self._counts.tolist()) if 0 < count < self._ranks]


@dataclass(frozen=True)
class Published:
    """A rank's part of a buffer that any rank may fetch."""

    part: Tensor
    addresses: Mapping[int, int] = field(default_factory=dict)
    """Where the other ranks have their parts, if they can be read there."""


def absent_within(seconds: float, group: dist.ProcessGroup | None = None) -> list[int] | None:
    """Wait until all ranks of a group have come here, at most so long.

    Nothing is left under way: a collective that somebody misses has gloo wait for the group's own, long time.
    (So does ``dist.monitored_barrier`` on all ranks but the first.)

    Args:
        seconds: How long to wait.
        group: The group; by default that of all ranks.

    Returns:
        None if all came. Otherwise those that had not when the first rank gave up; for ranks that come later, too, and
        for all meetings from then on. Empty if nobody can tell, as the rank that counts is gone.

    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if ranks == 1:
        return None
    store = dist.distributed_c10d._get_process_group_store(group or dist.group.WORLD)  # type: ignore[arg-type]
    deadline = time.monotonic() + seconds
    with contextlib.suppress(RuntimeError):  # the store is on a rank, which may be gone
        meeting = store.add(f"accel/arrived/{rank}", 1)
        store.add("accel/arrived", 1)
        while not store.add("accel/missed", 0):
            if store.add("accel/arrived", 0) >= meeting * ranks:  # all meetings before were full
                return None
            if time.monotonic() > deadline:
                absent = [other for other in range(ranks) if store.add(f"accel/arrived/{other}", 0) < meeting]
                store.set("accel/absent", ",".join(map(str, absent)))
                store.add("accel/missed", 1)
            time.sleep(_PAUSE_S)
        return [int(other) for other in store.get("accel/absent").decode().split(",") if other]
    return []


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
        dist.broadcast(_real(tensor), group=self.group, group_src=source)

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
        counts = torch.tensor(flags, dtype=torch.int32)
        if self.ranks == 1:
            return Agreement(counts, 1, None)
        self.traffic.add("agree", ring(nbytes(counts), self.ranks, passes=2))
        return Agreement(counts, self.ranks, dist.all_reduce(counts, group=self._control, async_op=True))

    def sum_scalar(self, value: Tensor, *, maximum: bool = False) -> Tensor:
        """Sum (or maximum) of a 0-dim tensor over ranks, in place. Waits."""
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


class _Messages(Pending):
    """Sends and receives of gloo, which does not tell whether they are done: it can only be waited for."""

    @override
    def is_ready(self) -> bool:
        return True


class GlooCollectives(Collectives):
    """Point to point, for gloo. See [Note: gloo point to point]."""

    def __init__(
        self, device: torch.device, group: dist.ProcessGroup | None, control: dist.ProcessGroup | None
    ) -> None:
        super().__init__(device, group, control)
        # Agreed on: after an error on some ranks only, the ranks' counts may differ.
        global _numbers
        number: int = max(self.gather_objects(next(_numbers)))
        _numbers = itertools.count(number + 1)
        self._number = number % _OWNERS
        # Fetches and reductions are counted apart: which comes first may differ between ranks.
        self._operations = {False: 0, True: 0}
        self._scratch: list[Tensor] = []

    @override
    def trim(self) -> None:
        self._scratch.clear()

    @override
    def reduce_scatter(self, buffer: Tensor, layout: Layout, out: Tensor) -> Pending:
        self.traffic.add("reduce_scatter", sent_scattering(buffer, layout, self.rank))
        return self._scatter(buffer, layout, out)

    @override
    def all_gather(self, buffer: Tensor, layout: Layout) -> Pending:
        self.traffic.add("all_gather", sent_gathering(buffer, layout, self.rank))
        return _Messages(self._exchange_parts(buffer, layout, self._next_tag()))

    @override
    def fetch(self, source: Published, layout: Layout, buffer: Tensor) -> Pending:
        self.traffic.add("all_gather", sent_gathering(buffer, layout, self.rank))
        buffer[slice(*layout.part(self.rank))].copy_(source.part)
        return _Messages(self._exchange_parts(buffer, layout, self._next_tag(fetching=True)))

    @override
    def gather(self, part: Tensor, layout: Layout, whole: Tensor | None) -> None:
        self._count_gather(part)
        tag = self._next_tag()
        if whole is None:
            works = self._send(part, 0, tag)
        else:
            works = [w for p in self._peers() for w in self._receive(whole[slice(*layout.part(p))], p, tag)]
            whole[slice(*layout.part(0))].copy_(part)
        _Messages(works).wait()

    @override
    def all_reduce(self, buffer: Tensor, layout: Layout) -> Pending:
        self.traffic.add("all_reduce", sent_reducing(buffer, layout, self.rank))
        own = buffer[slice(*layout.part(self.rank))]
        first, tag = self._scatter(buffer, layout, own), self._next_tag()
        return TwoPhase(first, lambda: _Messages(self._exchange_parts(buffer, layout, tag)))

    @override
    def all_reduce_as(self, buffer: Tensor, wire: Tensor, layout: Layout) -> Pending:
        if wire.dtype.itemsize >= buffer.dtype.itemsize:
            return super().all_reduce_as(buffer, wire, layout)
        self.traffic.add("all_reduce", sent_reducing(wire, layout, self.rank))
        own = slice(*layout.part(self.rank))
        first, tag = self._scatter(wire, layout, buffer[own]), self._next_tag()

        def copy() -> None:
            buffer.copy_(wire)

        def send_back() -> Pending:
            wire[own].copy_(buffer[own])
            return _Messages(self._exchange_parts(wire, layout, tag), copy)

        return TwoPhase(first, send_back)

    def _scatter(self, buffer: Tensor, layout: Layout, out: Tensor) -> Pending:
        start, stop = layout.part(self.rank)
        own = buffer[start:stop]
        tag = self._next_tag()
        scratch = self._borrow((self.ranks - 1) * (stop - start), buffer)
        received = list(scratch[: (self.ranks - 1) * (stop - start)].view(self.ranks - 1, stop - start))
        works = [w for r, peer in zip(received, self._peers(), strict=True) for w in self._receive(r, peer, tag)]
        works += [w for peer in self._peers() for w in self._send(buffer[slice(*layout.part(peer))], peer, tag)]

        def add_up() -> None:
            # By rank, not by arrival: a sum must not depend on who was late.
            if not received:
                if out.data_ptr() != own.data_ptr():
                    out.copy_(own)
            else:
                add_first(own, received[0], out)
                for other in received[1:]:
                    out.add_(other)
            self._scratch.append(scratch)

        return _Messages(works, add_up)

    def _exchange_parts(self, buffer: Tensor, layout: Layout, tag: int) -> list[Any]:
        own = buffer[slice(*layout.part(self.rank))]
        works = [w for p in self._peers() for w in self._receive(buffer[slice(*layout.part(p))], p, tag)]
        return works + [w for peer in self._peers() for w in self._send(own, peer, tag)]

    def _peers(self) -> list[int]:
        """The other ranks of the group, by rank."""
        return [rank for rank in range(self.ranks) if rank != self.rank]

    def _send(self, tensor: Tensor, peer: int, tag: int) -> list[Any]:
        return [dist.isend(_real(tensor), group=self.group, group_dst=peer, tag=tag)] if tensor.numel() else []

    def _receive(self, tensor: Tensor, peer: int, tag: int) -> list[Any]:
        return [dist.irecv(_real(tensor), group=self.group, group_src=peer, tag=tag)] if tensor.numel() else []

    def _next_tag(self, *, fetching: bool = False) -> int:
        self._operations[fetching] += 1
        half = _TAGS // 2
        return self._number * _TAGS + half * fetching + self._operations[fetching] % half

    def _borrow(self, numel: int, like: Tensor) -> Tensor:
        """A receive buffer of at least ``numel`` elements; returned buffers are used again."""
        for position, tensor in enumerate(self._scratch):
            if tensor.numel() >= numel and tensor.dtype == like.dtype:
                return self._scratch.pop(position)
        for position, tensor in enumerate(self._scratch):
            if tensor.dtype == like.dtype:  # too small: let a larger one take its place
                self._scratch.pop(position)
                break
        return torch.empty(numel, dtype=like.dtype, device=like.device)


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


class TorchCollectives(Collectives):
    """torch.distributed's own collectives: NCCL and every other back end."""

    _stream: torch.Stream | None = None

    @override
    def reduce_scatter(self, buffer: Tensor, layout: Layout, out: Tensor) -> Pending:
        self.traffic.add("reduce_scatter", sent_scattering(buffer, layout, self.rank))
        if layout.is_even and out.dtype == buffer.dtype:
            return Pending([_reduce_scatter_single(_real(out), _real(buffer), group=self.group, async_op=True)])
        # Every part to its rank, then a local sum: any back end can do that with parts of different sizes, and it adds
        # up in any dtype.
        start, stop = layout.part(self.rank)
        received = buffer.new_empty((self.ranks, stop - start))
        work = dist.all_to_all_single(
            _real(received.view(-1)),
            _real(buffer),
            [stop - start] * self.ranks,
            [end - begin for begin, end in map(layout.part, range(self.ranks))],
            group=self.group,
            async_op=True,
        )

        def add_up() -> None:
            torch.sum(received, 0, dtype=out.dtype, out=out)

        return Pending([work], add_up)

    @override
    def all_gather(self, buffer: Tensor, layout: Layout) -> Pending:
        self.traffic.add("all_gather", sent_gathering(buffer, layout, self.rank))
        if layout.is_even:
            mine = _real(buffer[slice(*layout.part(self.rank))])
            return Pending([_all_gather_single(_real(buffer), mine, group=self.group, async_op=True)])
        parts = [_real(buffer[slice(*layout.part(peer))]) for peer in range(self.ranks)]
        return Pending(
            [
                dist.broadcast(part, group=self.group, group_src=peer, async_op=True)
                for peer, part in enumerate(parts)
                if part.numel()
            ]
        )

    @override
    def gather(self, part: Tensor, layout: Layout, whole: Tensor | None) -> None:
        self._count_gather(part)
        messages = {0: part}
        if whole is not None:
            whole[slice(*layout.part(0))].copy_(part)
            messages = {peer: whole[slice(*layout.part(peer))] for peer in range(1, self.ranks)}
        kind: Callable[..., Any] = dist.isend if whole is None else dist.irecv
        batch = [
            dist.P2POp(kind, _real(tensor), group=self.group, group_peer=peer)
            for peer, tensor in messages.items()
            if tensor.numel()
        ]
        if batch:  # in one call: NCCL would connect each pair of ranks anew otherwise
            Pending(dist.batch_isend_irecv(batch)).wait()

    @override
    def all_reduce(self, buffer: Tensor, layout: Layout) -> Pending:
        self.traffic.add("all_reduce", sent_reducing(buffer, layout, self.rank))
        return Pending([dist.all_reduce(_real(buffer), group=self.group, async_op=True)])

    @override
    def all_reduce_after(self, first: Pending, buffer: Tensor, layout: Layout) -> Pending:
        if self.device.type == "cpu":
            return super().all_reduce_after(first, buffer, layout)
        # A stream of its own waits for the first: neither the host does, nor what computes meanwhile.
        if self._stream is None:
            self._stream = torch.Stream(self.device)
        with self._stream:
            first.wait()
            return self.all_reduce(buffer, layout)


# The ``*_tensor`` names are deprecated from torch 2.13 on, the ``*_single`` names do not exist before.
_reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def connect(device: torch.device, group: dist.ProcessGroup | None = None) -> Collectives:
    """The collectives that suit a device and process group.

    Args:
        device: Where the buffers live.
        group: The process group; the default group if not given. It must be initialised already. On a device other
            than the CPU a gloo group is made beside it (a collective call) for messages that the host reads: reading
            them must not wait for the device.

    Raises:
        RuntimeError: If torch.distributed is not initialised.

    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "Expected an initialised torch.distributed process group, found none. Start the script with torchrun, or"
            " through Lightning's Trainer or Fabric, or call torch.distributed.init_process_group first."
        )
    if "fake" in str(dist.get_backend(group)):
        from lightning_accel.core.simulated import SimulatedCollectives

        return SimulatedCollectives(device, group, group)
    if device.type == "cpu":
        if "gloo" not in str(dist.get_backend(group)):
            return TorchCollectives(device, group, group)
        from lightning_accel.core.direct import DirectCollectives

        messages = GlooCollectives(device, group, group)
        return (messages.ranks > 1 and DirectCollectives.connect(messages)) or messages
    return TorchCollectives(device, group, group_beside(group, device))


def group_beside(group: dist.ProcessGroup | None, device: torch.device) -> dist.ProcessGroup:
    """A gloo group of the same ranks, for messages of the host. All of them make it together."""
    whole = group is None or group is dist.group.WORLD
    made: dist.ProcessGroup = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=timeout_of(group, device),
        backend="gloo",
        # Of a part of all processes only its own take part. Torch then makes the name from the number of groups that a
        # process is in, which may differ between ranks: where all take part it is not done so.
        use_local_synchronization=not whole,
    )
    return made


def timeout_of(group: dist.ProcessGroup | None, device: torch.device) -> timedelta:
    """How long a process group waits for its ranks."""
    backend = (group or dist.group.WORLD)._get_backend(device)  # type: ignore[union-attr]
    options = getattr(backend, "options", None)
    timeout: timedelta = getattr(options, "_timeout", dist.default_pg_timeout)
    return timeout


def nbytes(tensor: Tensor) -> int:
    """Size of a tensor's elements in bytes."""
    return tensor.numel() * tensor.element_size()


def add_first(own: Tensor, other: Tensor, out: Tensor) -> None:
    """``out = own + other``, added up in the dtype of ``out``."""
    if out.dtype == own.dtype:
        torch.add(own, other, out=out)
    else:
        out.copy_(own).add_(other)


def _real(tensor: Tensor) -> Tensor:
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
