"""What a unit's gradients travel in, where that is not the dtype they are added up in.

[Note: rounded once]
Rows that add gradients up on each rank keep them as precise as what they update. What travels is a rounded copy: one
rounding on the way out, after all micro-batches. The ranks' copies are added up in the wider of the two dtypes where
the collectives can do so; where every rank is to have the sum, it is rounded once more on its way back, and the rank
that added it up takes the rounded one as well: all have the same bits. What does not fit becomes infinite on the way
out, or on the way back, and is so on all ranks that have it: nothing is clamped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_accel.core.collectives import Collectives, Pending
from lightning_accel.core.layout import Layout
from lightning_accel.core.pool import BufferPool


class Wire:
    """A copy of one unit's gradients in the dtype they travel in, there while a reduction is under way.

    Args:
        dtype: What they travel in.
        layout: How the ranks divide the unit.
        collectives: Of the ranks that do.
        pool: Lends the memory.

    """

    def __init__(self, dtype: torch.dtype, layout: Layout, collectives: Collectives, pool: BufferPool) -> None:
        self.dtype = dtype
        self._layout = layout
        self._collectives = collectives
        self._pool = pool
        self._lent: Tensor | None = None

    def all_reduce(self, gradients: Tensor) -> Pending:
        """Replace gradients by their sum over ranks: bit for bit the same on every rank.

        Args:
            gradients: This rank's contribution, 1-D, all of the unit.

        """
        return self._collectives.all_reduce_as(gradients, self._load(gradients), self._layout)

    def reduce_scatter(self, gradients: Tensor, out: Tensor) -> Pending:
        """Add up the ranks' gradients; this rank's part of the sum lands in ``out``.

        Args:
            gradients: This rank's contribution, 1-D, all of the unit.
            out: As many elements as this rank's part, which it may be.

        """
        buffer = self._load(gradients)
        if self.dtype.itemsize < out.dtype.itemsize:
            return self._collectives.reduce_scatter(buffer, self._layout, out)
        part = buffer[slice(*self._layout.part(self._collectives.rank))]
        return Pending([self._collectives.reduce_scatter(buffer, self._layout, part)], _copying(out, part))

    def close(self) -> None:
        """Give the memory back: the reduction has been waited for."""
        assert self._lent is not None
        self._pool.give_back(self._lent)
        self._lent = None

    def _load(self, gradients: Tensor) -> Tensor:
        assert self._lent is None
        self._lent = self._pool.borrow(self._layout.total, self.dtype, gradients.device)
        buffer = self._lent[: self._layout.total]
        buffer.copy_(gradients)
        return buffer


def _copying(out: Tensor, source: Tensor) -> Callable[[], None]:
    def copy() -> None:
        out.copy_(source)

    return copy
