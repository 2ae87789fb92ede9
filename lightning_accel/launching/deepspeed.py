"""DeepSpeed files that a launch passes on: checked before ranks start."""

from __future__ import annotations

import os

from lightning_accel.deepspeed_config import Batches, DeepSpeedConfig, Meaning
from lightning_accel.deepspeed_config.values import AUTO


def absolute(path: str) -> str:
    """A path that holds wherever the script goes."""
    return os.path.abspath(os.path.expanduser(path))


def require_sound(path: str, ranks: int | None = None) -> None:
    """Raise if a file would be refused by the ranks.

    Args:
        path: The file.
        ranks: How many there will be on all machines, if that is known.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON (with line and column), or not accepted, or its batch sizes do not add up.

    """
    config = DeepSpeedConfig.read(path)
    Meaning.of(config)
    train, micro = config.given("train_batch_size"), config.given("train_micro_batch_size_per_gpu")
    steps = config.values.get("gradient_accumulation_steps")
    if ranks is not None and train is not None and micro is not None and steps != AUTO:
        Batches.of(ranks, train, micro, steps, config.where)
