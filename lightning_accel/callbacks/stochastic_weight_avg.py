"""Stochastic weight averaging, in parts where the optimizer's state is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import Self, override

from lightning_accel.callbacks.averaged import averaged_state, engine_of, has_engine
from lightning_accel.core.agreement import broadcast_tensors
from lightning_accel.core.average import Average, AverageFunction


class _PartsOfAverage:
    """Stands where Lightning's callback has its averaged copy of the model.

    There is no average, and no memory for one, before the first update.

    Args:
        trainer: Its strategy has the engine, once fit has started.
        avg_fn: As for ``Average``.
        device: Where the average is kept.

    """

    def __init__(self, trainer: pl.Trainer, avg_fn: AverageFunction | None, device: torch.device | str | None) -> None:
        self._trainer = trainer
        self._avg_fn = avg_fn
        self._device = device
        self._loaded: Mapping[str, Any] | None = None
        self.average: Average | None = None

    def to(self, device: torch.device | str) -> Self:
        """Called before the first update."""
        return self

    def state_dict(self) -> None:
        """Nothing yet: ``on_save_checkpoint`` puts it in."""
        return

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep an average until there is an engine."""
        self._loaded = state

    def resume(self, count: int) -> None:
        """Take over what was loaded, the average of ``count`` values."""
        loaded, self._loaded = self._loaded, None
        if loaded and count:
            self._begin().load_state_dict(loaded, count)

    def update(self) -> None:
        """Take the model's parameters into the average."""
        (self.average or self._begin()).update()

    def transfer(self) -> None:
        """Give the model the average, if there is one: training may end before the first update."""
        if self.average is not None:
            self.average.transfer()

    def _begin(self) -> Average:
        engine = engine_of(self._trainer)
        self.average = Average(engine, avg_fn=self._avg_fn, buffers="leave", device=self._device)
        return self.average


class StochasticWeightAveraging(callbacks.StochasticWeightAveraging):
    """Lightning's ``StochasticWeightAveraging`` under the strategies of this package, without a copy of the model.

    The schedule is Lightning's own. Each rank averages the part of the parameters that its optimizer updates.
    Checkpoints are those of Lightning's callback: either can continue from the other's. Under a strategy that is not of
    this package this *is* Lightning's callback.

    ``avg_fn`` sees 1-D tensors that hold parts of parameters, and must treat each element alone. If training ends
    before the first average, the model keeps what it has learned (Lightning's callback gives it its first values back).

    Args:
        swa_lrs: The learning rate to anneal to; a list has one for each parameter group.
        swa_epoch_start: The epoch to start in, counted from 1, or the share of ``max_epochs`` that goes before.
        annealing_epochs: Epochs until the learning rate is ``swa_lrs``.
        annealing_strategy: ``"cos"`` or ``"linear"``.
        avg_fn: From average, current value and number of values so far to the new average; the mean by default.
        device: Where the average is kept; None keeps it with the parameters.

    Raises:
        MisconfigurationException: As Lightning's.

    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not has_engine(trainer):
            super().setup(trainer, pl_module, stage)
            return
        self._average_model = None
        if stage == "fit":
            is_mean = self._avg_fn is callbacks.StochasticWeightAveraging.avg_fn
            parts = _PartsOfAverage(trainer, None if is_mean else self._avg_fn, self._device)
            self._average_model = cast("pl.LightningModule", parts)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        parts = self._parts()
        if parts is not None:
            parts.resume(self._init_n_averaged)

    def _parts(self) -> _PartsOfAverage | None:
        parts: object = self._average_model
        return parts if isinstance(parts, _PartsOfAverage) else None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """In the epoch for BatchNorm's statistics, have all ranks keep rank 0's: no backward does it there."""
        if self._parts() is not None and trainer.fit_loop._skip_backward:
            broadcast_tensors(pl_module.buffers(), engine_of(trainer).collectives)

    @staticmethod
    @override
    def update_parameters(
        average_model: pl.LightningModule, model: pl.LightningModule, n_averaged: Tensor, avg_fn: AverageFunction
    ) -> None:
        """Called by Lightning's callback to update the average."""
        parts: object = average_model
        if isinstance(parts, _PartsOfAverage):
            parts.update()
            n_averaged += 1
        else:
            callbacks.StochasticWeightAveraging.update_parameters(average_model, model, n_averaged, avg_fn)

    @staticmethod
    @override
    def transfer_weights(src_pl_module: pl.LightningModule, dst_pl_module: pl.LightningModule) -> None:
        """Called by Lightning's callback to give the model the average."""
        parts: object = src_pl_module
        if isinstance(parts, _PartsOfAverage):
            parts.transfer()
        else:
            callbacks.StochasticWeightAveraging.transfer_weights(src_pl_module, dst_pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the averaged model where Lightning's callback has it. Before the first update it is the model itself."""
        parts = self._parts()
        if parts is not None:
            state = checkpoint["state_dict"]
            if parts.average is not None:
                state = averaged_state(pl_module, state, parts.average)
            checkpoint["callbacks"][self.state_key]["average_model_state"] = state

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the average, which the model has by now."""
        parts = self._parts()
        if parts is not None:
            parts.average = None
        super().teardown(trainer, pl_module, stage)
