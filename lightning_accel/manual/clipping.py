"""Clipping of the gradients of several optimizers as one vector."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_accel.core.clipping import Gradients
from lightning_accel.manual.optimizer import PreparedOptimizer


class Together(Gradients):
    """The gradients of several optimizers, which may belong to different models.

    Args:
        optimizers: The optimizers.

    """

    def __init__(self, optimizers: Sequence[PreparedOptimizer]) -> None:
        self._all = [optimizer.added for optimizer in optimizers]
        self.dtype = functools.reduce(torch.promote_types, [added.norm_dtype for added in self._all], torch.float32)
        """Of their norm."""

    @override
    def tensors(self) -> list[Tensor]:
        return [tensor for added in self._all for tensor in added.gradients.tensors()]

    @override
    def norms(self, norm_type: float) -> list[Tensor]:
        """One for each optimizer: of its gradients on all ranks, which take part."""
        return [added.engine.grad_norm(added.optimizer, norm_type).to(self.dtype) for added in self._all]

    @override
    def multiply(self, factor: float) -> None:
        for added in self._all:
            added.gradients.multiply(factor)


def optimizers_of(
    parameters: Tensor | Iterable[Tensor] | nn.Module, optimizers: Sequence[PreparedOptimizer]
) -> list[PreparedOptimizer]:
    """Those that update some parameters.

    Args:
        parameters: All that the optimizers are to be found by, or a model with them.
        optimizers: Among which to look.

    Raises:
        ValueError: If no optimizer has one of them, or an optimizer has others besides: where gradients rest sharded
            they are clipped as a whole.
        TypeError: If they are no tensors.

    """
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if wrong := [type(entry).__name__ for entry in given if not isinstance(entry, Tensor)]:
        raise TypeError(f"Expected parameters to clip, as model.parameters() has them, got {', '.join(set(wrong))}.")
    rest = {parameter: None for parameter in given if parameter.requires_grad}
    found = []
    for optimizer in optimizers:
        own = [parameter for parameter in optimizer.added.parameters() if parameter.requires_grad]
        inside = [parameter for parameter in own if parameter in rest]
        if inside and len(inside) < len(own):
            raise ValueError(
                f"Expected all parameters of an optimizer to be clipped together, got {len(inside)} of {len(own)} of a"
                f" {type(optimizer).__name__.removeprefix('Fabric')}. Pass model.parameters(), or give these"
                " parameters an optimizer of their own."
            )
        if inside:
            found.append(optimizer)
            for parameter in inside:
                del rest[parameter]
    if rest:
        shapes = [list(parameter.shape) for parameter in rest][:3]
        raise ValueError(
            f"Expected parameters of prepared optimizers to clip, got {len(rest)} that no prepared optimizer has"
            f" (shapes {shapes}{', …' if len(rest) > 3 else ''}). Prepare their optimizer, or freeze them with"
            " requires_grad_(False)."
        )
    return found
