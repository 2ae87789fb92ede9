"""Distributed training for PyTorch Lightning: one engine, many strategies.

Importing this package registers the ``accel_*`` strategies with Lightning's Trainer and Fabric.
"""

from importlib.util import find_spec
from typing import Any

from lightning_accel.core import engine_of

__all__ = ["engine_of", "plan"]
__version__ = "0.1.0"

_MANUAL = (
    "Accelerator",
    "LocalSGD",
    "debug_launcher",
    "find_executable_batch_size",
    "notebook_launcher",
    "set_seed",
    "skip_first_batches",
)
"""What is imported when it is asked for."""

# The engine itself needs torch alone.
if find_spec("lightning") is not None:
    from lightning_accel.plugins import AccelPrecision
    from lightning_accel.strategies import register

    __all__ += ["AccelPrecision", *_MANUAL]
    register()


def __getattr__(name: str) -> Any:
    # torch's fake tensors take a while to import, and few need them.
    if name == "plan":
        from lightning_accel.planning import plan

        return plan
    if name in _MANUAL:  # needs Lightning
        from lightning_accel import manual

        return getattr(manual, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
