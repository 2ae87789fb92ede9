"""DeepSpeed's learning-rate schedules as torch's: the same names, parameters and values, for any torch optimizer.

Knows torch only.
"""

from lightning_accel.schedules.one_cycle import OneCycle
from lightning_accel.schedules.range_test import LRRangeTest
from lightning_accel.schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]
