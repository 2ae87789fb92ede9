"""Averages of the weights after optimizer steps or epochs, in parts where the optimizer's state is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from typing_extensions import override

from lightning_accel.callbacks.averaged import averaged_state, engine_of, has_engine
from lightning_accel.core.average import Average


class WeightAveraging(callbacks.WeightAveraging):
    """Lightning's ``WeightAveraging`` under the strategies of this package, without a copy of the whole model.

    Each rank averages the part of the parameters that its optimizer updates. An update sends nothing. The model is
    validated with the averaged weights and has them when training ends. Checkpoints are those of Lightning's callback:
    either can continue from the other's. Under a strategy that is not of this package this *is* Lightning's callback.

    ``avg_fn`` and ``multi_avg_fn`` see 1-D tensors that hold parts of parameters, and must treat each element alone.
    Frozen parameters are not averaged: they are taken as they are.

    Args:
        device: Where the average is kept; with the parameters by default. ``"cpu"`` saves device memory.
        use_buffers: Average the buffers, too; otherwise those of the last update go with the average.
        kwargs: ``avg_fn`` or ``multi_avg_fn`` as for ``torch.optim.swa_utils.AveragedModel``; the mean by default.

    Raises:
        ValueError: When fit starts, if both functions are given.

    Example::

        Trainer(strategy="accel_fsdp", callbacks=[WeightAveraging(avg_fn=get_ema_avg_fn(0.99))])

    """

    _average: Average | None = None
    _loaded: tuple[Mapping[str, Any], int] | None = None  # an average to continue from, until there is an engine
    _final_count: int | None = None  # of a fit that is over: the model has its average

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not has_engine(trainer):
            super().setup(trainer, pl_module, stage)
            return
        self._average_model = self._average = self._loaded = None
        if stage == "fit":
            self._final_count = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the average, or take over that of a checkpoint."""
        if not has_engine(trainer):
            super().on_fit_start(trainer, pl_module)
            return
        buffers: Any = "average" if self._use_buffers else "copy"
        self._average = Average(engine_of(trainer), buffers=buffers, device=self._device, **self._kwargs)
        if self._loaded is not None:
            self._average.load_state_dict(*self._loaded)
            self._loaded = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if self._average is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif trainer.global_step > self._latest_update_step and self.should_update(step_idx=trainer.global_step - 1):
            self._average.update()
            self._latest_update_step = trainer.global_step

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        if self._average is None:
            super().on_train_epoch_end(trainer, pl_module)
        elif epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._average.update()
            self._latest_update_epoch = epoch

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average is None:
            super().on_train_end(trainer, pl_module)
        else:
            self._average.transfer()

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average is None:
            super().on_validation_epoch_start(trainer, pl_module)
        else:
            self._average.swap()

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average is None:
            super().on_validation_epoch_end(trainer, pl_module)
        else:
            self._average.swap()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the average, which the model has by now."""
        if self._average is not None:
            self._final_count = self._average.count
            self._average = None
        super().teardown(trainer, pl_module, stage)

    # ------------------------------------------------------------- checkpoints

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        current = checkpoint["state_dict"]
        if self._average is not None:
            averaged = averaged_state(pl_module, current, self._average)
            if self._average.is_swapped:  # saved within validation
                current, averaged = averaged, current
            _write(checkpoint, current, averaged, self._average.count)
        elif self._final_count is not None:
            _write(checkpoint, current, current, self._final_count)
        else:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not has_engine(trainer) or trainer.state.fn != TrainerFn.FITTING:
            self._final_count = None
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        elif "current_model_state" in checkpoint and "averaging_state" in checkpoint:
            rank_zero_info(
                "The model starts from the current_model_state of the checkpoint, its average from state_dict."
            )
            averaged, count = checkpoint["state_dict"], int(checkpoint["averaging_state"]["n_averaged"])
            if self._average is None:
                self._loaded = averaged, count
            else:  # within fit, as a Tuner does
                self._average.load_state_dict(averaged, count)
            current = {**checkpoint, "state_dict": checkpoint["current_model_state"]}
            trainer.strategy.load_model_state_dict(current, strict=pl_module.strict_loading)
        else:
            rank_zero_warn(
                f"Expected a checkpoint that was made with {type(self).__name__}, got one without an average. The model"
                " and its average both start from its state_dict."
            )


class EMAWeightAveraging(WeightAveraging, callbacks.EMAWeightAveraging):
    """Lightning's ``EMAWeightAveraging`` as ``WeightAveraging`` above: an exponential moving average of the weights.

    Args:
        device: Where the average is kept; with the parameters by default.
        use_buffers: Average the buffers, too.
        decay: Weight of the average in an update; the current values have the rest.
        update_every_n_steps: Update after so many optimizer steps each.
        update_starting_at_step: The first optimizer step, counted from 0, to update after.
        update_starting_at_epoch: From this epoch on, counted from 0, update after each epoch.
        kwargs: None.

    Raises:
        ValueError: If an averaging function is given.

    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise ValueError(f"Expected no further arguments, got {', '.join(kwargs)}. Use WeightAveraging for these.")
        super().__init__(
            device, use_buffers, decay, update_every_n_steps, update_starting_at_step, update_starting_at_epoch
        )
        self._kwargs = {"multi_avg_fn": get_ema_multi_avg_fn(decay)}  # one pass in place


def _write(checkpoint: dict[str, Any], current: Mapping[str, Any], averaged: Mapping[str, Any], count: int) -> None:
    """Put both states into a checkpoint, where Lightning's callback puts them."""
    state: dict[str, Tensor] = {"n_averaged": torch.tensor(count)}
    checkpoint.update(state_dict=averaged, current_model_state=current, averaging_state=state)
