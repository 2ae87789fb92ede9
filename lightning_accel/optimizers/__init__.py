"""Optimizers that torch does not have, for every row of the engine and for plain torch.

Knows torch and the engine's core only.
"""

from lightning_accel.optimizers.lamb import Lamb
from lightning_accel.optimizers.lion import Lion
from lightning_accel.optimizers.muon import MuonWithAuxAdam

__all__ = ["Lamb", "Lion", "MuonWithAuxAdam"]
