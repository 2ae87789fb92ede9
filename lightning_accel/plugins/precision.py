"""Lightning's precision plugins, with clipping by the engine.

A precision plugin clips the gradients it finds in ``optimizer.param_groups``. Where gradients rest sharded no rank has
them there, and where they rest in flat buffers a few large tensors are quicker than many small ones. So the plugin that
the Trainer chose, or the user gave, is copied and the copy clips through the engine. All else it does stays its own.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

from lightning_accel.core.engine import Engine
from lightning_accel.core.optimizer import EngineOptimizer

_CLIPPING = ("clip_gradients", "clip_grad_by_norm", "clip_grad_by_value")


def engine_optimizer(optimizer: Any) -> EngineOptimizer | None:
    """The engine's side of an optimizer, wrapped by Lightning or not; None if no engine has it."""
    inner = getattr(optimizer, "_optimizer", optimizer)
    found = getattr(inner, "_engine_optimizer", None)
    return found if isinstance(found, EngineOptimizer) else None


def with_engine_clipping(plugin: Precision) -> Precision:
    """A copy of a Trainer precision plugin that clips through the engine.

    Args:
        plugin: Any precision plugin; it is left as it is, and used as it is if its class clips in its own way.

    Returns:
        A plugin of the same class, so that the state it saves is found again under the same name.

    """
    if any(not getattr(type(plugin), name).__module__.startswith("lightning.") for name in _CLIPPING):
        return plugin  # a class of the user's, with rules of its own about clipping
    changed = copy.copy(plugin)
    changed.__dict__["clip_gradients"] = partial(_clip_gradients, plugin)
    return changed


def _clip_gradients(
    plugin: Precision,
    optimizer: Optimizer,
    clip_val: int | float = 0.0,
    gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
) -> None:
    added = engine_optimizer(optimizer)
    scales = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
    if added is None or scales:
        # A gradient scaler has rules of its own about who unscales what before clipping.
        plugin.clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
    elif clip_val > 0:
        engine: Engine = added.engine
        if gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            engine.clip_grad_value_(added.optimizer, clip_val)
        else:
            engine.clip_grad_norm_(added.optimizer, clip_val)


def require_no_scaler(plugin: Precision | FabricPrecision, row: str) -> None:
    """Raise if a plugin scales gradients in a way that a row with sharded gradients cannot follow yet.

    Raises:
        ValueError: Says what to use instead.

    """
    scaler = getattr(plugin, "scaler", None)
    if scaler is not None:
        raise ValueError(
            f"Expected a precision without a gradient scaler for strategy='accel_{row}', got"
            f" precision={getattr(plugin, 'precision', type(plugin).__name__)!r}: its scaler looks at whole gradients,"
            " which no rank has. Use precision='bf16-mixed', or strategy='accel_ddp'."
        )
