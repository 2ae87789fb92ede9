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
from lightning.fabric.plugins import precision as fabric_plugins
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch.plugins import precision as trainer_plugins
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

from lightning_accel.core.engine import Engine
from lightning_accel.core.grad_scaler import GradScaler
from lightning_accel.core.optimizer import EngineOptimizer
from lightning_accel.core.placement import Rest, Row
from lightning_accel.plugins.accel_precision import PolicyPrecision

_CLIPPING = ("clip_gradients", "clip_grad_by_norm", "clip_grad_by_value")
_TORCHS = (torch.amp.GradScaler, torch.cuda.amp.GradScaler)

_FOREIGN = {
    "FSDPPrecision": "fsdp",
    "DeepSpeedPrecision": "deepspeed",
    "XLAPrecision": "xla",
}
"""Plugins that leave the work to one strategy of Lightning, or to its library."""

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
        policy = getattr(plugin, "policy", None)
        narrows = policy is None or (policy.compute.itemsize == 2 and policy.compute is not policy.master)
        if not (isinstance(plugin, (MixedPrecision, FabricMixedPrecision)) and narrows):
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


def require_suitable(plugin: FabricPrecision, row: Row) -> None:
    """Raise if a plugin was made for another strategy.

    Raises:
        ValueError: Says what to use instead.

    """
    for name, strategy in _FOREIGN.items():
        if isinstance(plugin, (getattr(trainer_plugins, name), getattr(fabric_plugins, name))):
            raise ValueError(
                f"Expected a precision plugin for any strategy with strategy='accel_{row.name}', got"
                f" {type(plugin).__name__}, which is for strategy={strategy!r}. Use precision='bf16-mixed' (or another"
                " name), or plugins=[lightning_accel.AccelPrecision(...)]."
            )
    quantised = (trainer_plugins.BitsandbytesPrecision, fabric_plugins.BitsandbytesPrecision)
    if row.parameters is Rest.SHARDED and isinstance(plugin, quantised):
        raise ValueError(
            f"Expected floating-point parameters for strategy='accel_{row.name}', which cuts them, got"
            " BitsandbytesPrecision, which packs several into a byte. Use strategy='accel_zero2'."
        )


def computes_with(plugin: FabricPrecision, row: Row) -> torch.dtype | None:
    """What parameters of a model are rounded to after each update, if the precision has it so.

    Under autocast those are matrices, where each rank updates its part only: every rank has half the bytes then, and
    half of them travel. Where each rank updates all parameters they stay as they are, and autocast rounds them for each
    use, as Lightning's users know it.
    """
    if isinstance(plugin, PolicyPrecision):
        return plugin.policy.rounded_to(row)
    if row.optimizer_state is Rest.SHARDED and isinstance(plugin, (MixedPrecision, FabricMixedPrecision)):
        return torch.float16 if plugin.precision == "16-mixed" else torch.bfloat16
    return None
