"""The manual loop: Accelerate's verbs on this project's engine, by way of Lightning Fabric. See docs/accelerator.md."""

from lightning_accel.data import skip_first_batches
from lightning_accel.manual.accelerator import Accelerator
from lightning_accel.manual.batch_size import find_executable_batch_size
from lightning_accel.manual.launchers import debug_launcher, notebook_launcher
from lightning_accel.manual.local_sgd import LocalSGD
from lightning_accel.manual.seeding import set_seed

__all__ = [
    "Accelerator",
    "LocalSGD",
    "debug_launcher",
    "find_executable_batch_size",
    "notebook_launcher",
    "set_seed",
    "skip_first_batches",
]
