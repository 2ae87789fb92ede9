"""Buffers that are needed for a while only."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_accel.core.collectives import nbytes
from lightning_accel.core.memory import taken, zeros


class BufferPool:
    """Full-size gradient buffers that units borrow for one backward.

    Args:
        keeps: Whether buffers are kept when none is lent. Otherwise they are freed then: no gradient buffer stays
            between steps.

    """

    def __init__(self, *, keeps: bool = True) -> None:
        self._keeps = keeps
        self._free: list[Tensor] = []
        self._lent = 0
        self.peak_bytes = 0

    def borrow(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of at least ``numel`` elements with arbitrary finite content."""
        fits = [i for i, t in enumerate(self._free) if t.numel() >= numel and t.dtype == dtype]
        if fits:
            buffer = self._free.pop(min(fits, key=lambda i: self._free[i].numel()))
        else:
            # Better a new larger buffer instead of a small one than both.
            small = [i for i, t in enumerate(self._free) if t.dtype == dtype]
            if small:
                self._free.pop(small[0])
            make = zeros if self._keeps else _short_lived
            buffer = taken(make(numel, dtype, device), "gradients")
        self._lent += nbytes(buffer)
        self.peak_bytes = max(self.peak_bytes, self._lent + sum(map(nbytes, self._free)))
        return buffer

    def clear(self) -> None:
        """Free all buffers that are not lent."""
        self._free.clear()

    def give_back(self, buffer: Tensor) -> None:
        """Make a borrowed buffer available again."""
        self._lent -= nbytes(buffer)
        self._free.append(buffer)
        if not self._keeps and not self._lent:
            self.clear()


def _short_lived(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """From the allocator, which has it at hand again for the next backward."""
    return torch.zeros(numel, dtype=dtype, device=device)
