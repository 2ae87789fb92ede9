"""The loss scale and the skipped steps, in the logs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_accel.core.grad_scaler import GradScaler


class LossScaleMonitor(pl.Callback):
    """Logs ``accel/loss_scale`` and ``accel/skipped_steps`` after each batch, as often as the Trainer logs.

    The scale is the one for the next step; skipped steps are counted from the start of the run, over restarts.

    Example::

        trainer = Trainer(strategy="accel_zero2", precision="16-mixed", callbacks=[LossScaleMonitor()])

    """

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(trainer.scaler, GradScaler):
            rank_zero_warn(
                "LossScaleMonitor has nothing to log: the precision has no gradient scaler of lightning_accel. Use"
                " precision='16-mixed' with one of its strategies."
            )

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        scaler = trainer.scaler
        if isinstance(scaler, GradScaler):
            values = {"accel/loss_scale": scaler.get_scale(), "accel/skipped_steps": float(scaler.skipped_steps)}
            pl_module.log_dict(values, on_step=True, on_epoch=False)
