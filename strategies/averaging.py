"""Lightning's own averaging callbacks copy whole models: what to use where parameters rest sharded."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lightning_accel.core import Engine


def require_averaging_in_parts(callbacks: Sequence[pl.Callback], engine: Engine) -> None:
    """Raise if a callback would average parameters that rest sharded as if they were whole.

    Raises:
        ValueError: Names the callback and what to use instead.

    """
    if not any(unit.memory.is_sharded for unit in engine.units):
        return
    from lightning_accel import callbacks as ours  # they import the strategies

    theirs = (StochasticWeightAveraging, WeightAveraging)
    for callback in callbacks:
        if isinstance(callback, theirs) and not isinstance(callback, tuple(getattr(ours, t.__name__) for t in theirs)):
            kind = type(callback)
            use = next(base.__name__ for base in kind.__mro__ if hasattr(ours, base.__name__))
            raise ValueError(
                f"Expected callbacks that can average parameters which rest sharded over the ranks, got"
                f" {kind.__module__}.{kind.__name__}, which copies whole models. Use (or derive from)"
                f" lightning_accel.callbacks.{use}: it takes the same arguments and reads the same checkpoints."
            )
