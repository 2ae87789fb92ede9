"""Distributed training for PyTorch Lightning: one engine, many strategies.

Importing this package registers the ``accel_*`` strategies with Lightning's Trainer and Fabric.
"""

from importlib.util import find_spec

from lightning_accel.core import engine_of

__all__ = ["engine_of"]
__version__ = "0.1.0"

# The engine itself needs torch alone.
if find_spec("lightning") is not None:
    from lightning_accel.plugins import AccelPrecision
    from lightning_accel.strategies import register

    __all__ += ["AccelPrecision"]
    register()
