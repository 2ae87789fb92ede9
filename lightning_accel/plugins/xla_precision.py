"""Which of Lightning's precisions there are on XLA devices."""

from __future__ import annotations

from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision


def suitable(plugin: Precision) -> Precision:
    """The plugin to use on XLA devices instead of one that the Trainer chose, or that one itself.

    Args:
        plugin: Of ``precision="32-true"``, ``"bf16-mixed"`` or ``"bf16-true"``.

    Raises:
        ValueError: If it is another one.

    """
    if type(plugin) is Precision or (type(plugin) is HalfPrecision and plugin.precision == "bf16-true"):
        return plugin
    if type(plugin) is MixedPrecision and plugin.precision == "bf16-mixed":
        return MixedPrecision("bf16-mixed", device="xla")
    raise ValueError(
        "Expected precision to be '32-true', 'bf16-mixed' or 'bf16-true' with accel_xla, got"
        f" {plugin.precision!r} ({type(plugin).__name__}). XLA devices compute in bf16, which has the range of fp32 and"
        " needs no loss scale."
    )
