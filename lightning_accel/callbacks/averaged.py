"""What the averaging callbacks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_accel.core import Engine
from lightning_accel.core.average import Average
from lightning_accel.core.checkpoint import Shard
from lightning_accel.strategies.trainer import AccelStrategy


def has_engine(trainer: pl.Trainer) -> bool:
    """Whether the Trainer's strategy is one of this package."""
    return isinstance(trainer.strategy, AccelStrategy)


def engine_of(trainer: pl.Trainer) -> Engine:
    """The engine of the fit that is under way."""
    assert isinstance(trainer.strategy, AccelStrategy)
    assert trainer.strategy.engine is not None
    return trainer.strategy.engine


def averaged_state(module: pl.LightningModule, current: Mapping[str, Any], average: Average) -> dict[str, Any]:
    """A model's state dict with the averaged values. All ranks take part.

    Args:
        module: The model.
        current: Its state dict: whole on rank 0 at least, or this rank's parts.
        average: The average of its parameters.

    Returns:
        A state dict with the keys of ``current``. If that is whole, it is right on the ranks that
        ``Average.state_dict`` answers.

    Raises:
        ValueError: If the state dict holds the model's parameters under other names than the model.

    """
    in_parts = any(isinstance(value, Shard) for value in current.values())
    averaged = average.shards() if in_parts else average.state_dict()
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    renamed = [name for name, value in current.items() if isinstance(value, Tensor) and name not in known]
    missing = [name for name, _ in module.named_parameters() if name in averaged and name not in current]
    if renamed and missing:
        raise ValueError(
            f"Expected the state dict of {type(module).__name__} to hold parameters by the names that they have in the"
            f" model, but {missing[0]!r} is missing and {renamed[0]!r} is no parameter. Rename them in"
            " on_save_checkpoint of the LightningModule, which is called last, and not in state_dict."
        )
    return {name: averaged.get(name, value) for name, value in current.items()}
