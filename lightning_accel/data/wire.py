"""Batches on their way from rank 0 to the others: the structure as an object, the tensors as bytes.

They travel over a group of their own for messages of the host, so that nothing which training sends gets in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_accel.core.groups import group_beside
from lightning_accel.data.batches import TensorShape, filled, map_leaves, outline, tensors_of

_ALIGNED = 16
"""Bytes: where tensors may begin within a message."""

_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()
"""Those made so far: process groups cannot be ended safely, so they are used again."""


def host_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A group of the same ranks for messages of the host. All of them call this together the first time."""
    whole = group or dist.group.WORLD
    assert whole is not None
    if whole not in _groups:
        device = torch.device("cpu")
        backends = whole._device_types
        _groups[whole] = group_beside(group, device if device in backends else backends[0])
    return _groups[whole]


@dataclass(frozen=True)
class Delivery:
    """What a rank gets of a round."""

    batch: Any
    """Its batch; None if there is none for it."""
    has_batch: bool
    is_last: bool
    """Whether this rank gets nothing more."""
    remainder: int = -1
    """Of the last round: samples that are no duplicates; -1 if all are, or nobody knows."""
    is_end: bool = False
    """Of what rank 0 sends: whether it sends nothing more to anybody."""


@dataclass(frozen=True)
class _Round:
    """What rank 0 tells all of a round."""

    outlines: list[Any]
    """Of each rank's batch; none at all: there are no more rounds."""
    has_batch: list[bool]
    is_last: list[bool]
    remainder: int
    failure: str = ""


class Wire:
    """Between rank 0 and the others.

    Args:
        group: The ranks. All of them make it together.

    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = host_group(group)
        self.rank, self.ranks = dist.get_rank(self._group), dist.get_world_size(self._group)

    def send(self, shares: Sequence[Any], is_last: list[bool], remainder: int) -> Delivery:
        """Give each rank its batch of a round. Rank 0 calls this, the others ``receive``.

        Args:
            shares: By rank; None for those that get none.
            is_last: By rank, whether it gets nothing more.
            remainder: See ``Delivery``.

        """
        has_batch = [share is not None for share in shares]
        self._tell(_Round([outline(share) for share in shares], has_batch, is_last, remainder))
        _send({rank: share for rank, share in enumerate(shares) if rank}, self._group)
        return Delivery(shares[0], has_batch[0], is_last[0], remainder, all(is_last))

    def send_end(self) -> None:
        """Tell that there are no more rounds."""
        self._tell(_Round([], [], [], -1))

    def send_failure(self, error: BaseException) -> None:
        """Tell that rank 0 cannot go on."""
        self._tell(_Round([], [], [], -1, failure=f"{type(error).__name__}: {error}"))

    def receive(self) -> Delivery:
        """This rank's batch of a round.

        Raises:
            RuntimeError: If rank 0 could not load it.

        """
        box: list[Any] = [None]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        told: _Round = box[0]
        if told.failure:
            raise RuntimeError(f"rank 0, which loads the batches of all ranks, has failed: {told.failure}")
        if not told.outlines:
            return Delivery(None, False, True, is_end=True)
        batch = _received(told.outlines[self.rank], 0, self._group)
        return Delivery(batch, told.has_batch[self.rank], told.is_last[self.rank], told.remainder, all(told.is_last))

    def _tell(self, told: _Round) -> None:
        dist.broadcast_object_list([told], group=self._group, group_src=0)


def lend(batch: Any, source: int, takers: Sequence[int], group: dist.ProcessGroup) -> Any:
    """A copy of one rank's batch, for those that take it. All ranks of the group call this.

    Args:
        batch: On ``source``, the batch.
        source: The rank that has it.
        takers: The ranks that want it.
        group: For messages of the host.

    """
    rank = dist.get_rank(group)
    box = [outline(batch) if rank == source else None]
    dist.broadcast_object_list(box, group=group, group_src=source)
    if rank == source:
        _send(dict.fromkeys(takers, batch), group)
    return _received(box[0], source, group) if rank in takers else None


def _send(batches: Mapping[int, Any], group: dist.ProcessGroup) -> None:
    """Send the tensors of a batch to each of some ranks."""
    works = []
    for rank, batch in batches.items():
        message = _packed(tensors_of(batch))
        if message.numel():
            works.append((dist.isend(message, group=group, group_dst=rank), message))
    for work, _ in works:
        assert work is not None
        work.wait()


def _received(outlined: Any, source: int, group: dist.ProcessGroup) -> Any:
    """The batch of an outline, whose tensors a rank sends."""
    shapes: list[TensorShape] = []
    map_leaves(lambda leaf: shapes.append(leaf) if isinstance(leaf, TensorShape) else None, outlined)
    message = torch.empty(sum(_room(shape.empty()) for shape in shapes), dtype=torch.uint8)
    if message.numel():
        dist.recv(message, group=group, group_src=source)
    return filled(outlined, _unpacked(message, shapes))


def _room(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return size + -size % _ALIGNED


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors, one after another."""
    message = torch.zeros(sum(map(_room, tensors)), dtype=torch.uint8)
    place = 0
    for tensor in tensors:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        message[place : place + plain.numel()].copy_(plain)
        place += _room(tensor)
    return message


def _unpacked(message: Tensor, shapes: Sequence[TensorShape]) -> list[Tensor]:
    tensors, place = [], 0
    for shape in shapes:
        tensor = shape.empty()
        part = message[place : place + tensor.numel() * tensor.element_size()]
        tensors.append(part.view(shape.dtype).view(shape.shape) if tensor.numel() else tensor)
        place += _room(tensor)
    return tensors
