"""Lightning's own averaging callbacks copy whole models: what to use where a rank has less, or rounded values."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lightning_accel.core import Engine


def require_averaging_in_parts(callbacks: Sequence[pl.Callback], engine: Engine) -> None:
    """Raise if a callback would average parameters that rest sharded as if they were whole, or rounded values.

    (In bf16 an average moves no more once it is near: 0.999 rounds to 1.)

    Raises:
        ValueError: Names the callback and what to use instead.

    """
    if any(unit.memory.is_sharded for unit in engine.units):
        what = "parameters which rest sharded over the ranks"
    elif any(unit.memory.has_master for unit in engine.units):
        what = "the precise values of parameters which mixed precision has rounded"
    else:
        return
    from lightning_accel import callbacks as ours  # they import the strategies

    theirs = (StochasticWeightAveraging, WeightAveraging)
    for callback in callbacks:
        if isinstance(callback, theirs) and not isinstance(callback, tuple(getattr(ours, t.__name__) for t in theirs)):
            kind = type(callback)
            use = next(base.__name__ for base in kind.__mro__ if hasattr(ours, base.__name__))
            raise ValueError(
                f"Expected callbacks that can average {what}, got"
                f" {kind.__module__}.{kind.__name__}, which copies whole models. Use (or derive from)"
                f" lightning_accel.callbacks.{use}: it takes the same arguments and reads the same checkpoints."
            )
