"""Lightning plugins that know the engine, or how its checkpoints are written."""

import lightning  # noqa: F401  # [Note: registration]

from lightning_accel.plugins.accel_precision import AccelPrecision
from lightning_accel.plugins.checkpoint_io import AccelCheckpointIO

__all__ = ["AccelCheckpointIO", "AccelPrecision"]
