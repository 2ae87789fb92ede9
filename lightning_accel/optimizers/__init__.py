"""Optimizers that torch does not have, for every row of the engine and for plain torch.

Knows torch and the engine's core only.
"""

from lightning_accel.optimizers.lamb import Lamb
from lightning_accel.optimizers.lion import Lion

__all__ = ["Lamb", "Lion"]
