"""What the model computes with, and what travels, where that is not the dtype it came with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lightning_accel.core.placement import Rest, Row

_PRECISE = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""Modules whose parameters autocast leaves alone, and may have two or more dimensions."""


def matrices(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of a module that autocast would round."""
    precise = {p for part in module.modules() if isinstance(part, _PRECISE) for p in part.parameters(recurse=False)}
    return {p for p in module.parameters() if p.dim() >= 2 and p not in precise}


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """Dtypes of mixed precision; None is the dtype that parameters came with.

    What autocast would not round keeps its dtype: parameters with less than two dimensions, all of layers that
    normalise (which want them precise), and tables of embeddings, whose rows begin the residual stream. Without
    autocast nothing converts them where they meet others, so all parameters must be of one dtype.
    """

    param: torch.dtype | None = None
    """What forward and backward see of parameters that are twice as wide (fp32 for 16 bits), and what is gathered. The
    optimizer updates values of the dtype they came with."""
    vectors: bool = False
    """Whether forward and backward see ``param`` instead of every wider parameter, whatever it is for."""
    reduce: torch.dtype | None = None
    """What gradients travel in; by default what they are computed in, and where they are added up on each rank what
    they rest in. They are added up, over ranks and micro-batches, in the dtype of what they update. See core/wire.py
    for rows that add them up on each rank."""

    grad: torch.dtype | None = None
    """What gradients of rounded parameters are added up and rest in; by default the dtype of what they update."""

    @staticmethod
    def checked(
        param: torch.dtype | None,
        reduce: torch.dtype | None,
        row: Row,
        *,
        vectors: bool = False,
        grad: torch.dtype | None = None,
    ) -> Dtypes:
        """The meaning of a user's settings.

        Raises:
            ValueError: If a dtype is not a floating-point one, or the row cannot do it.

        """
        for name, dtype in (("param_dtype", param), ("reduce_dtype", reduce), ("grad_dtype", grad)):
            if dtype is not None and not dtype.is_floating_point:
                raise ValueError(f"Expected {name} to be a floating-point dtype, got {dtype}.")
        if param is not None and row.optimizer_state is not Rest.SHARDED:
            raise ValueError(
                f"Expected param_dtype for rows that shard optimizer state only, got {param} for row {row.name!r}: each"
                " rank would keep every parameter twice. Use torch.autocast, which precision='bf16-mixed' does."
            )
        if grad is not None and param is None:
            raise ValueError(
                f"Expected grad_dtype together with param_dtype only, got {grad} alone: gradients of parameters that"
                " are not rounded rest in the parameters' own dtype. Give param_dtype as well."
            )
        return Dtypes(param=param, reduce=reduce, vectors=vectors, grad=grad)

    def of(self, dtype: torch.dtype, *, is_matrix: bool) -> torch.dtype:
        """What the model computes with instead of parameters of a dtype.

        Args:
            dtype: What they came with.
            is_matrix: Whether autocast would round them.

        """
        if self.param is None or not dtype.is_floating_point:
            return dtype
        if self.vectors:
            return self.param if self.param.itemsize < dtype.itemsize else dtype
        if not is_matrix:
            return dtype
        # As autocast does: it takes a model of doubles to want them.
        return self.param if 2 * self.param.itemsize == dtype.itemsize else dtype
