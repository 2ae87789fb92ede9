"""Lightning's precision plugins, with clipping and loss scaling by the engine.

A precision plugin clips the gradients it finds in ``optimizer.param_groups``, and torch's scaler unscales those. Where
gradients rest sharded no rank has them there, and where they rest in flat buffers a few large tensors are quicker than
many small ones. So the plugin that the Trainer or Fabric chose, or the user gave, is copied, and the copy clips and
scales through the engine. All else it does stays its own, and it keeps its class, by whose name its state is saved.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

from lightning_accel.core.engine import Engine
from lightning_accel.core.grad_scaler import GradScaler
from lightning_accel.core.optimizer import EngineOptimizer
from lightning_accel.core.placement import Rest, Row

_CLIPPING = ("clip_gradients", "clip_grad_by_norm", "clip_grad_by_value")
_TORCHS = (torch.amp.GradScaler, torch.cuda.amp.GradScaler)

Plugin = TypeVar("Plugin", bound=FabricPrecision)


def engine_optimizer(optimizer: Any) -> EngineOptimizer | None:
    """The engine's side of an optimizer, wrapped by Lightning or not; None if no engine has it."""
    inner = getattr(optimizer, "_optimizer", optimizer)
    found = getattr(inner, "_engine_optimizer", None)
    return found if isinstance(found, EngineOptimizer) else None


def with_engine(plugin: Plugin, grad_scaler: GradScaler | None = None) -> Plugin:
    """A copy of a precision plugin that clips and scales through the engine.

    Args:
        plugin: Any precision plugin of the Trainer or of Fabric; it is left as it is. If its class clips in its own
            way, so does the copy. One of torch's scalers is replaced by one with the same settings and state; a scaler
            of another class is kept.
        grad_scaler: The scaler to use. With bf16-mixed it is a check for overflow.

    Returns:
        A plugin of the same class, so that the state it saves is found again under the same name.

    Raises:
        ValueError: If there is a ``grad_scaler`` and the precision is not a mixed one, or has another one already.

    """
    changed = copy.copy(plugin)
    scaler = getattr(plugin, "scaler", None)
    if grad_scaler is not None:
        if not isinstance(plugin, (MixedPrecision, FabricMixedPrecision)):
            raise ValueError(
                "Expected precision='16-mixed' or 'bf16-mixed' together with grad_scaler, got"
                f" {getattr(plugin, 'precision', type(plugin).__name__)!r}. Leave grad_scaler out."
            )
        if isinstance(scaler, GradScaler) and scaler is not grad_scaler:
            raise ValueError(
                "Expected one gradient scaler, got one with the strategy and another with the precision plugin. Leave"
                " one of them out."
            )
        changed.__dict__["scaler"] = grad_scaler
    elif isinstance(scaler, torch.amp.GradScaler) and type(scaler) in _TORCHS:
        changed.__dict__["scaler"] = GradScaler.like(scaler)
    if isinstance(plugin, Precision) and all(
        getattr(type(plugin), name).__module__.startswith("lightning.") for name in _CLIPPING
    ):
        changed.__dict__["clip_gradients"] = partial(_clip_gradients, changed)
    return changed


def _clip_gradients(
    plugin: Any,
    optimizer: Optimizer,
    clip_val: int | float = 0.0,
    gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
) -> None:
    added = engine_optimizer(optimizer)
    scaler = getattr(plugin, "scaler", None)
    if added is None or not isinstance(scaler, GradScaler | None):
        # A scaler that the engine does not know has rules of its own about who unscales what before clipping.
        type(plugin).clip_gradients(plugin, optimizer, clip_val, gradient_clip_algorithm)
    elif clip_val != 0:  # which is how Lightning's users say that they want none
        engine: Engine = added.engine
        if scaler is not None:
            scaler.unscale_(added.optimizer)  # under manual optimization nobody else has done so
        if gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            engine.clip_grad_value_(added.optimizer, clip_val)
        else:
            engine.clip_grad_norm_(added.optimizer, clip_val)


def require_known_scaler(plugin: FabricPrecision, row: str) -> None:
    """Raise if a plugin scales gradients in a way that a row with sharded gradients cannot follow.

    Raises:
        ValueError: Says what to use instead.

    """
    scaler = getattr(plugin, "scaler", None)
    if not isinstance(scaler, GradScaler | None):
        raise ValueError(
            f"Expected a lightning_accel.core.GradScaler for strategy='accel_{row}', got"
            f" {type(scaler).__module__}.{type(scaler).__qualname__}, which looks at whole gradients, and no rank has"
            " them. Give a GradScaler with grad_scaler=... to the strategy, or use strategy='accel_ddp'."
        )


def computes_with(plugin: FabricPrecision, row: Row) -> torch.dtype | None:
    """What the matrices of a model are rounded to under mixed precision, if each rank updates its part only.

    Every rank has half the bytes then, and half of them travel; autocast would round them for each use otherwise. Where
    each rank updates all parameters they stay as they are, and autocast rounds them, as Lightning's users know it.
    """
    if row.optimizer_state is Rest.SHARDED and isinstance(plugin, (MixedPrecision, FabricMixedPrecision)):
        return torch.float16 if plugin.precision == "16-mixed" else torch.bfloat16
    return None
