"""Distributed training for PyTorch Lightning: one engine, many strategies.

Importing this package registers the ``accel_*`` strategies with Lightning's Trainer and Fabric.
"""

from importlib.util import find_spec
from typing import Any

from lightning_accel.core import engine_of

__all__ = ["engine_of", "plan"]
__version__ = "0.1.0"

# The engine itself needs torch alone.
if find_spec("lightning") is not None:
    from lightning_accel.plugins import AccelPrecision
    from lightning_accel.strategies import register

    __all__ += ["AccelPrecision", "Accelerator", "LocalSGD"]
    register()


def __getattr__(name: str) -> Any:
    # torch's fake tensors take a while to import, and few need them.
    if name == "plan":
        from lightning_accel.planning import plan

        return plan
    if name in ("Accelerator", "LocalSGD") and name in __all__:
        from lightning_accel import manual

        return getattr(manual, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
