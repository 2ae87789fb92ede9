"""PowerSGD: gradients of matrices travel as products of two thin ones. What users say about it.

Vogels, Karimireddy, Jaggi: "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", 2019
(https://arxiv.org/abs/1905.13727). How it is carried out is in core/low_rank.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_accel.core.placement import Rest, Row


@dataclass(frozen=True)
class PowerSGD:
    """Settings of gradient compression, by the names of torch's ``PowerSGDState``.

    For parameters of two or more dimensions, seen as matrices ``[n, m]`` of their first dimension and the rest, where
    ``(n + m) * rank * min_compression_rate < n * m``; others, and complex ones, travel whole.

    Raises:
        ValueError: If a number is out of range.

    """

    matrix_approximation_rank: int = 1
    """Columns of the two matrices that travel; at most ``min(n, m)``."""
    start_powerSGD_iter: int = 1000
    """How many reductions of a parameter are whole before the first compressed one."""
    min_compression_rate: float = 2
    """Compress only what becomes smaller by more than this factor."""
    use_error_feedback: bool = True
    """Keep what a reduction has left out, in memory as large as the gradient, and add it to the next."""
    warm_start: bool = True
    """Begin with the directions that the last reduction has found, instead of random ones."""
    random_seed: int = 0
    """Of random directions, the same on all ranks. torch's generators are not touched."""

    def __post_init__(self) -> None:
        for name, least in (("matrix_approximation_rank", 1), ("start_powerSGD_iter", 0), ("random_seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Expected {name} to be an integer of at least {least}, got {value!r}.")
        rate = self.min_compression_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (0 < rate < math.inf):
            raise ValueError(f"Expected min_compression_rate to be positive and finite, got {rate!r}.")

    def require_suitable(self, row: Row, reduce_dtype: torch.dtype | None) -> None:
        """Raise if gradients of a row cannot be compressed.

        Raises:
            ValueError: If it divides gradients, or what travels is to have another dtype.

        """
        if row.gradients is not Rest.REPLICATED:
            raise ValueError(
                f"Expected gradient_compression for row 'ddp' only, got PowerSGD for row {row.name!r}: where each rank"
                " keeps a part of the gradients nobody has the matrices. Leave it out, or use 'ddp'."
            )
        if reduce_dtype is not None:
            raise ValueError(
                f"Expected gradient_compression without reduce_dtype, got PowerSGD and {reduce_dtype}: what is rounded"
                " when it travels would be missing from what PowerSGD makes good later. Leave one of them out."
            )

    def rank_of(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """The number of columns that stand for a tensor; 0 if it travels whole."""
        if len(shape) < 2 or not dtype.is_floating_point:
            return 0
        rows, columns = shape[0], shape[1:].numel()
        rank = min(rows, columns, self.matrix_approximation_rank)
        return rank if (rows + columns) * rank * self.min_compression_rate < rows * columns else 0
