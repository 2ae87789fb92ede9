"""The manual loop: Accelerate's verbs on this project's engine, by way of Lightning Fabric. See docs/accelerator.md."""

from lightning_accel.manual.accelerator import Accelerator
from lightning_accel.manual.local_sgd import LocalSGD

__all__ = ["Accelerator", "LocalSGD"]
