"""Checkpoints from one format to another, and a look into them."""

from lightning_accel.convert.conversion import Conversion, Target, convert
from lightning_accel.convert.summary import OptimizerSummary, Summary, TensorSummary, inspect

__all__ = ["Conversion", "OptimizerSummary", "Summary", "Target", "TensorSummary", "convert", "inspect"]
