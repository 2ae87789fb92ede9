"""Which of Lightning's precisions there are on XLA devices."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.plugins import precision as fabric
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

from lightning_accel.core.grad_scaler import GradScaler
from lightning_accel.plugins.precision import with_engine

Plugin = TypeVar("Plugin", bound=fabric.Precision)
Mixed = TypeVar("Mixed", MixedPrecision, fabric.MixedPrecision)


def suitable(plugin: Plugin, grad_scaler: GradScaler | None = None) -> Plugin:
    """The plugin to use on XLA devices instead of one that the Trainer or Fabric chose, or that one itself.

    Args:
        plugin: Of ``precision="32-true"``, ``"16-mixed"``, ``"bf16-mixed"`` or ``"bf16-true"``.
        grad_scaler: The scaler to use. With bf16-mixed it is a check for overflow.

    Raises:
        ValueError: If it is another one, its scaler is another one than ``grad_scaler``, or cannot be followed.

    """
    kind: Any = type(plugin)
    if kind is MixedPrecision:
        mixed = _mixed(cast(MixedPrecision, plugin), grad_scaler)
        mixed.__dict__["clip_gradients"] = partial(_clip_gradients, mixed)
        return cast(Plugin, mixed)
    if kind is fabric.MixedPrecision:  # with Fabric the strategy unscales before it clips
        return cast(Plugin, _mixed(cast(fabric.MixedPrecision, plugin), grad_scaler))
    is_half = kind in (HalfPrecision, fabric.HalfPrecision) and plugin.precision == "bf16-true"
    if is_half or kind in (Precision, fabric.Precision):
        return plugin if grad_scaler is None else with_engine(plugin, grad_scaler)  # which says why not
    raise ValueError(
        "Expected precision to be '32-true', '16-mixed', 'bf16-mixed' or 'bf16-true' with accel_xla, got"
        f" {plugin.precision!r} ({kind.__name__})."
    )


def _mixed(plugin: Mixed, grad_scaler: GradScaler | None) -> Mixed:
    scaler = plugin.scaler
    torchs = isinstance(scaler, torch.amp.GradScaler)
    if scaler is not None and not isinstance(scaler, GradScaler) and not (torchs and scaler.is_enabled()):
        raise ValueError(
            f"Expected a gradient scaler that is enabled, of lightning_accel.core or torch.amp, with accel_xla, got"
            f" {type(scaler).__module__}.{type(scaler).__qualname__}. (torch disables those for CUDA where there is"
            " none.) Use precision='16-mixed', or MixedPrecision('16-mixed', device='xla')."
        )
    made = type(plugin)("16-mixed" if plugin.precision == "16-mixed" else "bf16-mixed", device="xla")
    made.scaler = scaler
    return with_engine(made, grad_scaler)


def _clip_gradients(
    plugin: MixedPrecision,
    optimizer: Optimizer,
    clip_val: int | float = 0.0,
    gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
) -> None:
    if isinstance(plugin.scaler, GradScaler) and clip_val != 0:
        plugin.scaler.unscale_(getattr(optimizer, "_optimizer", optimizer))  # nobody else does, manually
    MixedPrecision.clip_gradients(plugin, optimizer, clip_val, gradient_clip_algorithm)
