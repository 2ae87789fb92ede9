"""Lightning plugins that know the engine, how its checkpoints are written, or which devices there are."""

import lightning  # noqa: F401  # [Note: registration]

from lightning_accel.plugins.accel_precision import AccelPrecision
from lightning_accel.plugins.checkpoint_io import AccelCheckpointIO
from lightning_accel.plugins.xla_accelerator import AccelXLAAccelerator

__all__ = ["AccelCheckpointIO", "AccelPrecision", "AccelXLAAccelerator"]
