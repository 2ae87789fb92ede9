"""Losses that count by what they are means of: tokens, say, instead of ranks and micro-batches.

[Note: weighted means]
A loss that is the mean over n tokens is multiplied by n before its backward, so that what is added up over ranks and
micro-batches is the gradient of the sum over all tokens. At the accumulation boundary the ranks add up how many these
were (one number for each optimizer), and the gradients' factor becomes one over it. Under fp16 a weight enlarges
gradients as the loss scale does, so the scale settles accordingly lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_accel.core.collectives import Collectives
from lightning_accel.core.unit import Content

if TYPE_CHECKING:
    from lightning_accel.core.optimizer import EngineOptimizer


@dataclass
class Window:
    """What one optimizer's gradients were accumulated from, on this rank."""

    total: float = 0.0
    """The sum of the weights of losses that it got gradients from."""
    weighted: bool = False
    """Whether any loss had a weight."""
    unweighted: bool = False
    """Whether any had none."""
    normaliser: float | None = None
    """What gradients were multiplied by, to be a mean over the total; None if they are not that."""
    is_over: bool = False
    """Whether the optimizer has stepped with them, or skipped its step."""
    is_mixed: bool = False
    """Whether gradients were added to some that were stepped with."""

    def require_mean(self, has_gradients: bool) -> None:
        """Raise if there are gradients with weights that are not a mean yet.

        Raises:
            RuntimeError: If the last backward was within ``no_sync``.

        """
        if has_gradients and self.weighted and self.normaliser is None:
            raise RuntimeError(
                "Expected the last backward before optimizer.step() or clipping to be outside of no_sync when losses"
                " have weights: the ranks add these up there. Leave no_sync for it."
            )


class LossWeights:
    """The weights of one engine's losses.

    Args:
        world: All ranks.

    """

    def __init__(self, world: Collectives) -> None:
        self._world = world
        self.next: float | None = None
        """Of the loss of the next backward."""
        self.share: float | None = None
        """What losses without a weight are multiplied by; 0: no loss of this rank counts. None: nothing of the kind."""
        self._now: float | None = None

    def set(self, weight: float | Tensor) -> None:
        """Have the loss of the next backward count so much.

        Raises:
            ValueError: If it is not one number, finite and not negative.

        """
        if isinstance(weight, Tensor) and weight.numel() != 1:
            raise ValueError(f"Expected one number as the loss weight, got a tensor of shape {tuple(weight.shape)}.")
        value = float(weight)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"Expected the loss weight to be finite and not negative, got {value}. It says how many tokens or"
                " samples a loss is the mean of."
            )
        self.next = value

    def begin(self, optimizers: Sequence[EngineOptimizer]) -> bool:
        """Call before backward, when ``parameter.grad`` is hidden.

        Returns:
            Whether the loss counts at all. If not, what backward computes may be NaN and must be left out.

        Raises:
            RuntimeError: If there is a weight and no optimizer.

        """
        self._now, self.next = self.next, None
        is_out = self.share == 0.0
        if is_out and self._now is not None:
            self._now = 0.0
        if self._now is not None and not optimizers:
            raise RuntimeError(
                "Expected an optimizer before losses have weights, which make its gradients a mean, got none. Call"
                " engine.add_optimizer(optimizer) first."
            )
        for added in optimizers:
            window = added.window
            units = added.used_units
            if not (units or any(Content.LOCAL in unit.content for unit in added.units)):
                added.window = Window()
                continue
            if window.normaliser is not None and not window.is_over:  # more may come
                for unit in units:
                    assert unit.rest is not None
                    unit.rest.mul_(1.0 / window.normaliser)
                window.normaliser = None
        return self._now != 0.0 and not is_out

    def end(self, optimizers: Sequence[EngineOptimizer]) -> list[bool]:
        """Call when all gradients have arrived. Returns what the ranks are to agree on by a logical or."""
        told = []
        for added in optimizers:
            window = added.window
            if any(any(unit.arrivals) for unit in added.units):
                window.total += self._now or 0.0
                window.weighted |= self._now is not None
                window.unweighted |= self._now is None
                window.is_mixed |= window.is_over
            told += [window.weighted, window.unweighted, window.is_mixed]
        return told

    def agreed(self, optimizers: Sequence[EngineOptimizer], told: Sequence[bool], *, boundary: bool) -> None:
        """Have what was accumulated be means. All ranks take part, with the same arguments.

        Args:
            optimizers: All of the engine's.
            told: What any rank told in ``end``.
            boundary: Whether an optimizer step may follow.

        Raises:
            RuntimeError: If some losses had weights and others had none; on every rank.

        """
        weighted = []
        for added, some, others, mixed in zip(optimizers, told[::3], told[1::3], told[2::3], strict=True):
            if some and mixed:
                raise RuntimeError(
                    "Expected gradients to be dropped between an optimizer step and the next backward when losses have"
                    f" weights, but those of a {type(added.optimizer).__name__} were there still. Call"
                    " optimizer.zero_grad(), with set_to_none=True."
                )
            if some and others:
                raise RuntimeError(
                    "Expected all losses that are accumulated for an optimizer step, on all ranks, to have a weight or"
                    f" none to have one, got both for a {type(added.optimizer).__name__}. Call"
                    " engine.set_loss_weight(...) before every backward; a batch without a single token has weight 0."
                )
            if some and not added.window.is_over:
                weighted.append(added)
        if not boundary or not weighted:
            return
        totals = torch.tensor([added.window.total for added in weighted], dtype=torch.double)
        for added, total in zip(weighted, self._world.sum_scalar(totals.to(self._world.device)).tolist(), strict=True):
            added.window.normaliser = self._world.ranks / total if total else 1.0  # else gradients are zero
            added.gradients.multiply(added.window.normaliser)
