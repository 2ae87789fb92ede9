"""The placement rows on XLA devices: one process, one program over all devices, shardings as annotations.

Knows torch and torch_xla only, and imports torch_xla when it is first needed. See docs/xla.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_accel.core.xla.engine import XLAEngine
    from lightning_accel.core.xla.report import XLAReport
    from lightning_accel.core.xla.runtime import start

__all__ = ["XLAEngine", "XLAReport", "start"]

_HOMES = {"XLAEngine": "engine", "XLAReport": "report", "start": "runtime"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
