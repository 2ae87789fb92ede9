"""Gradient clipping on whatever part of the gradients a rank has: the single-device result under every row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.core.collectives import Collectives


@torch.no_grad()
def grad_norm(
    gradients: Sequence[Tensor],
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
    device = gradients[0].device if gradients else collectives.device
    # foreach functions refuse empty lists, and a rank may well have no gradients.
    norms = [
        norm.to(torch.promote_types(norm.dtype, torch.float32))
        for norm in (torch._foreach_norm(list(gradients), norm_type) if gradients else ())
    ]
    if sharded:
        # A rank without gradients must not make the others' dtype ambiguous: the sum travels in double.
        local = torch.stack([n.double() for n in norms]) if norms else torch.zeros(1, dtype=torch.double, device=device)
        local = local.to(device)
        if math.isinf(norm_type):
            # Not every back end's maximum passes NaN on.
            largest = local.max()
            both = torch.stack([largest.nan_to_num(nan=0.0, posinf=torch.inf), largest.isnan().double()])
            largest, is_nan = collectives.sum_scalar(both, maximum=True)
            return torch.where(is_nan > 0, torch.nan, largest).to(dtype)
        total = collectives.sum_scalar(local.pow(norm_type).sum())
        return total.pow(1.0 / norm_type).to(dtype)
    if not norms:
        return torch.zeros((), dtype=dtype, device=device)
    combined: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return combined.to(dtype)


@torch.no_grad()
def clip_grad_norm(
    gradients: Sequence[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    sharded: bool,
    collectives: Collectives,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Scale gradients in place so that their norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_``.

    Returns:
        The norm before clipping, of all gradients on all ranks.

    Raises:
        ValueError: If ``max_norm`` is negative or ``norm_type`` not positive.
        RuntimeError: If ``error_if_nonfinite`` and the norm is not finite; on every rank, and nothing is changed.

    """
    if max_norm < 0 or norm_type <= 0:
        raise ValueError(f"Expected max_norm >= 0 and norm_type > 0, got {max_norm} and {norm_type}.")
    norm = grad_norm(gradients, norm_type, sharded, collectives, dtype)
    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(
            f"The total norm of order {norm_type} of the gradients is {norm.item()}, so it cannot be clipped. To"
            " disable this error and scale the gradients by the non-finite norm anyway, set error_if_nonfinite=False."
        )
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    # On the CPU the factor is at hand: a pass over all gradients that multiplies by one is saved.
    if gradients and (norm.device.type != "cpu" or not bool(factor == 1.0)):
        torch._foreach_mul_(list(gradients), factor.to(gradients[0].device))
    return norm


@torch.no_grad()
def clip_grad_value(gradients: Sequence[Tensor], clip_value: float) -> None:
    """Clamp gradients in place to ``[-clip_value, clip_value]``, as ``torch.nn.utils.clip_grad_value_``.

    Raises:
        ValueError: If ``clip_value`` is negative.

    """
    if clip_value < 0:
        raise ValueError(f"Expected clip_value >= 0, got {clip_value}.")
    if gradients:
        torch._foreach_clamp_min_(list(gradients), -clip_value)
        torch._foreach_clamp_max_(list(gradients), clip_value)
