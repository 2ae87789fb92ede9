"""Gradient clipping on whatever part of the gradients a rank has: the single-device result under every row."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.core.collectives import Collectives

_CHUNK = 2**16
"""Elements whose powers are added up in the gradients' own precision, on the CPU. The 2-norm of 23M fp32 numbers at
once was off by 1.3e-3 with torch 2.13, the 1-norm by 3.7e-2; in such chunks, added up in double, by 1.5e-7 (randn, one
thread, against `norm` in double)."""


class Gradients:
    """This rank's gradients, as few tensors.

    Args:
        tensors: The gradients; they are changed in place.

    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)

    def tensors(self) -> list[Tensor]:
        """The gradients as they are to be used."""
        return self._tensors

    def norms(self, norm_type: float) -> list[Tensor]:
        """The p-norm of each tensor, in fp32 or wider."""
        return norms_of(self._tensors, norm_type)

    def multiply(self, factor: float) -> None:
        """Multiply all gradients by a number."""
        if self._tensors:  # foreach functions refuse empty lists
            torch._foreach_mul_(self._tensors, factor)

    def zero(self) -> None:
        """Set all gradients to zero."""
        if tensors := self.tensors():
            torch._foreach_zero_(tensors)


def norms_of(tensors: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    """The p-norm of each tensor, in fp32 or wider: infinite or NaN only if an element is."""
    if not tensors:
        return []
    norms = [_norm_in_chunks(tensor, norm_type) for tensor in tensors]
    if not all_finite(norms):
        # Finite elements can have powers that overflow, so it is not said yet that these are not finite.
        norms = [
            torch.linalg.vector_norm(tensor, norm_type, dtype=torch.promote_types(tensor.dtype, torch.float64))
            for tensor in tensors
        ]
    return norms


def _norm_in_chunks(tensor: Tensor, norm_type: float) -> Tensor:
    """The p-norm of a tensor in fp32 or wider; powers are added up in that within chunks, and these in double."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    flat = tensor.flatten()
    # torch's kernels for the CPU have few accumulators, see _CHUNK.
    rest = flat.numel() % _CHUNK if tensor.device.type == "cpu" else flat.numel()
    rows = flat[: flat.numel() - rest].view(-1, _CHUNK)
    parts = [torch.linalg.vector_norm(rows, norm_type, dim=1, dtype=wide)] if len(rows) else []
    parts += [torch.linalg.vector_norm(flat[flat.numel() - rest :], norm_type, dtype=wide).reshape(1)]
    combined: Tensor = torch.linalg.vector_norm(torch.cat(parts).double(), norm_type)
    return combined.to(wide.to_real())


def all_finite(norms: Sequence[Tensor]) -> bool:
    """Whether all of some 0-dim tensors are neither infinite nor NaN."""
    return not norms or bool(torch.isfinite(torch.stack([norm.double() for norm in norms])).all())


@torch.no_grad()
def grad_norm(
    gradients: Gradients,
    norm_type: float,
    sharded: bool,
    collectives: Collectives,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The norm of all gradients as one vector.

    Args:
        gradients: This rank's.
        norm_type: p of the p-norm; may be infinite.
        sharded: Whether other ranks have other gradients, instead of the same.
        collectives: The ranks. All of them must call this if ``sharded``.
        dtype: Of the result; the same on every rank, while some may have no gradients.

    Returns:
        0-dim tensor.

    """
    norms = gradients.norms(norm_type)
    if sharded:
        # A rank without gradients must not make the others' dtype ambiguous: the sum travels in double.
        local = torch.stack([n.double() for n in norms]) if norms else torch.zeros(1, dtype=torch.double)
        local = local.to(collectives.device)
        if math.isinf(norm_type):
            # Not every back end's maximum passes NaN on.
            largest = local.max()
            both = torch.stack([largest.nan_to_num(nan=0.0, posinf=torch.inf), largest.isnan().double()])
            largest, is_nan = collectives.sum_scalar(both, maximum=True)
            return torch.where(is_nan > 0, torch.nan, largest).to(dtype)
        total = collectives.sum_scalar(local.pow(norm_type).sum())
        return total.pow(1.0 / norm_type).to(dtype)
    if not norms:
        return torch.zeros((), dtype=dtype, device=collectives.device)
    combined: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return combined.to(dtype)


@torch.no_grad()
def clip_grad_norm(
    gradients: Gradients,
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    sharded: bool,
    collectives: Collectives,
    dtype: torch.dtype = torch.float32,
    *,
    skipped: bool = False,
) -> Tensor:
    """Scale gradients so that their norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_``.

    Where torch scales by a norm that is not finite, and so makes NaN of gradients and weights, gradients become zero.

    Args:
        gradients: This rank's.
        max_norm: The largest norm to leave.
        norm_type: p of the p-norm; may be infinite.
        error_if_nonfinite: Raise if the norm is not finite.
        sharded: Whether other ranks have other gradients, instead of the same.
        collectives: The ranks. All of them must call this if ``sharded``.
        dtype: Of the result.
        skipped: Whether it is known that the gradients are not finite and that their step will be skipped: then they
            are left as they are.

    Returns:
        The norm before clipping, of all gradients on all ranks; 0-dim.

    Raises:
        ValueError: If ``max_norm`` or ``norm_type`` is not positive.
        RuntimeError: If ``error_if_nonfinite`` and the norm is not finite; on every rank, and nothing is changed.

    """
    if not (max_norm > 0 and norm_type > 0):  # NaN is neither
        raise ValueError(f"Expected max_norm > 0 and norm_type > 0, got {max_norm} and {norm_type}.")
    norm = grad_norm(gradients, norm_type, sharded, collectives, dtype)
    if not bool(torch.isfinite(norm)):
        if error_if_nonfinite:
            raise RuntimeError(
                f"The total norm of order {norm_type} of the gradients is {norm.item()}, so it cannot be clipped. To"
                " disable this error and have the gradients set to zero instead, set error_if_nonfinite=False."
            )
        if not skipped:
            warnings.warn(
                f"The total norm of order {norm_type} of the gradients is {norm.item()}: they were set to zero, because"
                " clipping by it would make NaN of the weights. Look for NaN or Inf in data and losses.",
                stacklevel=2,
            )
            gradients.zero()
        return norm
    factor = float(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    if factor != 1.0:  # a pass over all gradients that multiplies by one is saved
        gradients.multiply(factor)
    return norm


@torch.no_grad()
def clip_grad_value(gradients: Gradients, clip_value: float) -> None:
    """Clamp gradients in place to ``[-clip_value, clip_value]``, as ``torch.nn.utils.clip_grad_value_``.

    Raises:
        ValueError: If ``clip_value`` is not positive.

    """
    if not clip_value > 0:  # NaN is not, either
        raise ValueError(f"Expected clip_value > 0, got {clip_value}.")
    if tensors := gradients.tensors():
        torch._foreach_clamp_min_(tensors, -clip_value)
        torch._foreach_clamp_max_(tensors, clip_value)
