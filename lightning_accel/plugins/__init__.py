"""Lightning plugins that know the engine."""

from lightning_accel.plugins.accel_precision import AccelPrecision

__all__ = ["AccelPrecision"]
