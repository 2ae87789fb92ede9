"""Pure arithmetic of flat buffers: which element of which parameter lies where, and on which rank.

No process group and no tensor is needed here. A unit's parameters lie end to end in one flat buffer, which is cut into
one part per rank::

    slots    |---- a ----|-- b --|------ c ------|-d-|
    buffer   0           .                           .     total
    cuts     |      rank 0       |      rank 1       |
    pieces         a, b[:5]           b[5:], c, d

``even`` cuts anywhere, at element granularity, and pads once at the end so that the parts are of equal size.
``owned`` never cuts a slot: each rank has whole tensors, so parts differ in size and nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 16
"""Every rank's part of an even layout starts at a multiple of this many elements (64 bytes of fp32), so that vector
instructions see aligned data. The most that an even layout pads is ``ranks * ALIGNMENT - 1`` elements a unit."""


@dataclass(frozen=True)
class Slot:
    """The place of one parameter in a flat buffer, in elements."""

    index: int
    """Which parameter of the list that the layout was made from."""
    start: int
    numel: int

    @property
    def stop(self) -> int:
        """First element behind the slot."""
        return self.start + self.numel


@dataclass(frozen=True)
class Piece:
    """The part of one slot that falls into a range of the buffer, in elements of the buffer."""

    slot: int
    """Position of the slot in :attr:`Layout.slots`."""
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where parameters lie in one flat buffer and how the ranks divide it."""

    slots: tuple[Slot, ...]
    cuts: tuple[int, ...]
    """Offsets at which the ranks' parts begin, and the total at the end: ``ranks + 1`` ascending numbers."""

    @property
    def total(self) -> int:
        """Elements of the whole buffer, padding included."""
        return self.cuts[-1]

    @property
    def ranks(self) -> int:
        """Number of parts."""
        return len(self.cuts) - 1

    @property
    def padding(self) -> int:
        """Elements that belong to no parameter."""
        return self.total - sum(slot.numel for slot in self.slots)

    @property
    def is_even(self) -> bool:
        """Whether all parts are of one size."""
        return len({stop - start for start, stop in map(self.part, range(self.ranks))}) == 1

    def part(self, rank: int) -> tuple[int, int]:
        """Range of the buffer that ``rank`` keeps when the buffer rests sharded."""
        return self.cuts[rank], self.cuts[rank + 1]

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The non-empty intersections of the slots with ``[start, stop)``, in buffer order."""
        return [
            Piece(position, max(slot.start, start), min(slot.stop, stop))
            for position, slot in enumerate(self.slots)
            if max(slot.start, start) < min(slot.stop, stop)
        ]


def even_layout(shapes: Sequence[Sequence[int]], ranks: int) -> Layout:
    """Lay parameters end to end and cut into equal parts, at any element.

    Matrices come first and vectors last, because optimizers commonly treat the two differently (weight decay) and
    neighbours that are treated alike are updated as one segment. Within each, tensors whose size keeps the next one
    aligned come first. The order of parameters is otherwise kept.

    Args:
        shapes: Shapes of the parameters.
        ranks: Number of parts.

    """
    numels = [math.prod(shape) for shape in shapes]
    order = sorted(range(len(shapes)), key=lambda i: (len(shapes[i]) < 2, numels[i] % ALIGNMENT != 0, i))
    slots, offset = _place(order, numels, 0)
    part = -(-offset // (ranks * ALIGNMENT)) * ALIGNMENT
    return Layout(tuple(slots), tuple(part * rank for rank in range(ranks + 1)))


def even_cuts(numel: int, ranks: int) -> tuple[int, ...]:
    """Offsets that divide ``numel`` elements into aligned parts of about the same size, with no padding."""
    part = -(-numel // (ranks * ALIGNMENT)) * ALIGNMENT
    return tuple(min(part * rank, numel) for rank in range(ranks + 1))


def owned_layout(numels: Sequence[int], owners: Sequence[int], ranks: int) -> Layout:
    """Lay whole parameters end to end, those of rank 0 first.

    Args:
        numels: Sizes of the parameters, in elements.
        owners: For each parameter, the rank that keeps it.
        ranks: Number of parts; a rank that owns nothing has an empty part.

    """
    slots: list[Slot] = []
    cuts = [0]
    for rank in range(ranks):
        mine = [i for i, owner in enumerate(owners) if owner == rank]
        placed, offset = _place(mine, numels, cuts[-1])
        slots += placed
        cuts.append(offset)
    return Layout(tuple(slots), tuple(cuts))


def _place(order: Sequence[int], numels: Sequence[int], offset: int) -> tuple[list[Slot], int]:
    slots = []
    for index in order:
        slots.append(Slot(index, offset, numels[index]))
        offset += numels[index]
    return slots, offset


def balance(numels: Sequence[int], ranks: int) -> list[int]:
    """Share whole tensors out so that ranks carry about the same: the largest first, each to the least loaded rank.

    Longest-processing-time-first scheduling (Graham, 1969): the fullest rank has at most 4/3 of the best possible load.

    Args:
        numels: Sizes of the tensors.
        ranks: Number of ranks.

    Returns:
        The owner of each tensor. Deterministic: ties go to the earlier tensor and the lower rank.

    """
    load = [0] * ranks
    owners = [0] * len(numels)
    for index in sorted(range(len(numels)), key=lambda i: (-numels[i], i)):
        owner = min(range(ranks), key=lambda rank: (load[rank], rank))
        owners[index] = owner
        load[owner] += numels[index]
    return owners


def pack(sizes: Sequence[int], cap: int) -> list[list[int]]:
    """Group neighbours so that no group of more than one member exceeds ``cap``.

    Args:
        sizes: Sizes in bytes, in order.
        cap: Most bytes of a group.

    Returns:
        Groups of positions, in order; an empty list for no sizes.

    """
    groups: list[list[int]] = []
    filled = 0
    for position, size in enumerate(sizes):
        if not groups or filled + size > cap:
            groups.append([])
            filled = 0
        groups[-1].append(position)
        filled += size
    return groups
