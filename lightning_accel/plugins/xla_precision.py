"""Which of Lightning's precisions there are on XLA devices."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.fabric.plugins import precision as fabric
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision

Plugin = TypeVar("Plugin", bound=fabric.Precision)


def suitable(plugin: Plugin) -> Plugin:
    """The plugin to use on XLA devices instead of one that the Trainer or Fabric chose, or that one itself.

    Args:
        plugin: Of ``precision="32-true"``, ``"bf16-mixed"`` or ``"bf16-true"``.

    Raises:
        ValueError: If it is another one.

    """
    kind: Any = type(plugin)
    if kind in (Precision, fabric.Precision):
        return plugin
    if kind in (HalfPrecision, fabric.HalfPrecision) and plugin.precision == "bf16-true":
        return plugin
    if kind in (MixedPrecision, fabric.MixedPrecision) and plugin.precision == "bf16-mixed":
        mixed: Plugin = kind("bf16-mixed", device="xla")
        return mixed
    raise ValueError(
        "Expected precision to be '32-true', 'bf16-mixed' or 'bf16-true' with accel_xla, got"
        f" {plugin.precision!r} ({type(plugin).__name__}). XLA devices compute in bf16, which has the range of fp32 and"
        " needs no loss scale."
    )
