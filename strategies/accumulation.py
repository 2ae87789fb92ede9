"""What the micro-batches of one optimizer step count, under the Trainer's automatic optimization."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor

from lightning_accel.core import Engine


class Accumulation:
    """Makes gradients the mean over the micro-batches that were there.

    Lightning divides each loss by ``accumulate_grad_batches``. Where there were fewer of them, at the end of an epoch,
    gradients would be too small by as much, so they are multiplied. Where losses have weights the division is undone,
    as these say all there is to say.
    """

    def __init__(self) -> None:
        self._losses = 0  # since the last optimizer step
        self._is_complete = False

    def end(self) -> None:
        """Call after each optimizer step, taken or skipped."""
        self._losses = 0
        self._is_complete = False

    def weigh(self, loss: Tensor, engine: Engine, module: pl.LightningModule) -> Tensor:
        """What is to be differentiated instead of the loss that Lightning has divided."""
        if not module.automatic_optimization:
            return engine.weigh(loss)
        self._losses += 1
        if engine.loss_weight is not None:
            loss = loss * module.trainer.accumulate_grad_batches
        return engine.weigh(loss)

    def complete(self, engine: Engine, module: pl.LightningModule) -> None:
        """Call after the last backward of an optimizer step, and before the step. All ranks take part."""
        if self._is_complete or not module.automatic_optimization:
            return
        self._is_complete = True  # the closure may be called again
        expected = module.trainer.accumulate_grad_batches
        if 0 < self._losses < expected:
            for added in engine.optimizers:
                if not added.window.weighted:
                    added.gradients.multiply(expected / self._losses)
