"""Pure arithmetic of checkpoints: which rectangular boxes of a tensor a range of its elements is.

Ranks divide flat buffers at any element; files describe parts of tensors as boxes. A range of a row-major tensor is a
few boxes, whose elements end to end are the range::

    range 3..14 of a 4 x 4 tensor        . . . a
                                         b b b b      boxes a, b (both rows) and c
                                         b b b b
                                         c c . .
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def common(self, other: Box) -> Box | None:
        """What two boxes of one tensor have in common; None if nothing."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(end - offset for offset, end in zip(offsets, ends, strict=True))
        return Box(offsets, sizes) if all(size > 0 for size in sizes) else None

    def of(self, tensor: Tensor, outer: Box | None = None) -> Tensor:
        """The part of a tensor that the box is, as a view.

        Args:
            tensor: The whole tensor, or what ``outer`` is of it.
            outer: The box that ``tensor`` is, if not all.

        """
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            start = offset - (outer.offsets[dim] if outer is not None else 0)
            tensor = tensor.narrow(dim, start, size)
        return tensor

    def permuted(self, order: Sequence[int]) -> Box:
        """The same box of the tensor that ``permute(order)`` makes."""
        return Box(tuple(self.offsets[dim] for dim in order), tuple(self.sizes[dim] for dim in order))

    def slabs(self, most: int) -> Iterator[Box]:
        """Cut into boxes of at most about ``most`` elements, whose elements end to end are those of this one."""
        if self.numel <= most or not self.sizes:
            yield self
            return
        # Along the first dimension that has more than one index: those before it do not change the order of elements.
        dim = next(d for d, size in enumerate(self.sizes) if size > 1)
        inner = math.prod(self.sizes[dim + 1 :])
        rows = max(1, most // inner)
        for start in range(0, self.sizes[dim], rows):
            offsets, sizes = list(self.offsets), list(self.sizes)
            offsets[dim] += start
            sizes[dim] = min(rows, self.sizes[dim] - start)
            yield from Box(tuple(offsets), tuple(sizes)).slabs(most)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes that a range of the elements of a row-major tensor is.

    Args:
        shape: Of the tensor.
        start: First element.
        stop: The element after the last.

    Returns:
        At most ``2 * len(shape) - 1`` boxes. Their elements, end to end, are the range.

    """
    assert 0 <= start <= stop <= math.prod(shape)
    if start == stop:
        return []
    if not shape:
        return [Box((), ())]
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        rest = boxes_of_range(shape[1:], start - first * inner, stop - first * inner)
        return [Box((first, *box.offsets), (1, *box.sizes)) for box in rest]
    found: list[Box] = []
    if start % inner:
        found += boxes_of_range(shape, start, (first + 1) * inner)
        first += 1
    full = stop // inner
    if full > first:
        found.append(Box((first,) + (0,) * (len(shape) - 1), (full - first, *shape[1:])))
    if stop % inner:
        found += boxes_of_range(shape, full * inner, stop)
    return found


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The order of dimensions in which the elements of a dense tensor lie in memory, the slowest first."""
    return tuple(sorted(range(len(shape)), key=lambda dim: (-strides[dim], -shape[dim])))
