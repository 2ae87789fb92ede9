"""Distributed training for PyTorch Lightning: one engine, many strategies.

Once this package and Lightning are imported, in whichever order, the ``accel_*`` strategies are registered with
Lightning's Trainer and Fabric.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_accel.importing import after_import

if TYPE_CHECKING:
    from lightning_accel.core import engine_of
    from lightning_accel.manual import (
        Accelerator,
        LocalSGD,
        debug_launcher,
        find_executable_batch_size,
        notebook_launcher,
        set_seed,
        skip_first_batches,
    )
    from lightning_accel.planning import plan
    from lightning_accel.plugins import AccelPrecision

__all__ = ["engine_of", "plan"]
__version__ = "0.1.0"

# The engine itself needs torch alone.
if find_spec("lightning") is not None:
    __all__ += [
        "AccelPrecision",
        "Accelerator",
        "LocalSGD",
        "debug_launcher",
        "find_executable_batch_size",
        "notebook_launcher",
        "set_seed",
        "skip_first_batches",
    ]

_HOMES = {"engine_of": "core", "plan": "planning", "AccelPrecision": "plugins"}
"""Where a name is from, if not from the manual loop."""
_PACKAGES = {
    "callbacks",
    "convert",
    "core",
    "data",
    "inference",
    "manual",
    "optimizers",
    "planning",
    "plugins",
    "schedules",
    "strategies",
}


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import, torch two: the command line does without them where it can.
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'manual')}"), name)
    if name in _PACKAGES:  # lightning_accel.data.joined, without a line that imports it
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# [Note: registration] Lightning's import has it import the strategies, which register themselves. That may happen in
# the middle of an import of this package's: what strategies are made of (plugins) therefore imports Lightning before it
# defines anything.
after_import("lightning", lambda _: import_module(f"{__name__}.strategies"))
