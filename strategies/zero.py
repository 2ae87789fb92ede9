"""accel_zero1, accel_zero2 and accel_zero3 for the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.core.placement import Row, find_row
from lightning_accel.strategies.deepspeed_file import DeepSpeedFile, FromFile
from lightning_accel.strategies.trainer import AccelStrategy

STAGES = {1: "zero1", 2: "zero2", 3: "zero3"}
"""The row of each ZeRO stage."""


class AccelZeROStrategy(AccelStrategy):
    """ZeRO: every rank keeps only its part of the optimizer state, of the gradients and, at stage 3, of the parameters.

    Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020.

    Args:
        stage: 1: gradients are added up on each rank until the accumulation boundary, then reduce-scattered. 2: they
            are reduce-scattered in every backward, so that no rank keeps more than its part. 3: parameters rest
            sharded, too: the same as :class:`~lightning_accel.strategies.fsdp.AccelFSDPStrategy`. Default: 2, or
            what ``config`` says, where 0 is data parallelism without ZeRO.
        config: A DeepSpeed JSON file, or a dict of what would be in it. It says what nothing else says: stage, offload,
            precision, loss scale, accumulation, clipping, and optimizer and scheduler if ``configure_optimizers``
            returns None. ``docs/from-deepspeed.md`` has every key.
        kwargs: See :class:`~lightning_accel.strategies.trainer.AccelStrategy`: ``units``, ``bucket_cap_mb``,
            ``compile``, ``activation_checkpointing``, ``activation_checkpointing_options``, ``grad_scaler``,
            ``process_group_backend``, ``timeout``, ``start_method`` and Lightning's own.

    """

    strategy_name = "accel_zero"

    def __init__(self, stage: int | None = None, config: DeepSpeedFile | None = None, **kwargs: Any) -> None:
        self._file = None if config is None else FromFile(config, stage, kwargs)
        if self._file is None:
            self.stage = 2 if stage is None else stage
            super().__init__(row_of_stage(self.stage), **kwargs)
        else:
            self.stage = self._file.stage
            super().__init__(self._file.row, **self._file.arguments)
            self._options = self._file.lay_out(self._options, None)

    @property
    def has_file(self) -> bool:
        """Whether there is a ``config``."""
        return self._file is not None

    @override
    def _choose_precision(self, plugin: Precision) -> Precision:
        if self._file is None:
            return plugin
        chosen, self._given_scaler = self._file.precision(plugin)
        return chosen

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if self._file is not None:
            self._options = self._file.lay_out(self._options, self.model)
            if trainer.state.fn == TrainerFn.FITTING:
                self._file.steer(trainer, self.world_size)
        super().setup(trainer)
        if self._file is not None and trainer.state.fn == TrainerFn.FITTING:
            assert self.engine is not None
            self._file.watch(self.engine)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        completed: AbstractContextManager[None] = nullcontext()
        if self._file is not None:
            completed = self._file.configuring(self.lightning_module)
        with completed:
            super().setup_optimizers(trainer)

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        if self._file is not None:
            self._file.require_batches(self.lightning_module.trainer, self.world_size)
        super().on_train_start()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        if self._file is not None:
            assert self.engine is not None
            self._file.note_step(self.engine)
        return result

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._file is not None:
            assert self.engine is not None
            self._file.end(self.engine)

    @classmethod
    @override
    def registered(cls) -> dict[str, dict[str, Any]]:
        return {row: {"stage": stage} for stage, row in STAGES.items()}


def row_of_stage(stage: int) -> Row:
    """The placement row of a ZeRO stage.

    Raises:
        ValueError: If there is no such stage.

    """
    if stage not in STAGES:
        raise ValueError(f"Expected stage to be one of {', '.join(map(str, STAGES))}, got {stage!r}.")
    return find_row(STAGES[stage])
