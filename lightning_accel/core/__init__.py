"""The engine: sharding, reduction, the optimizer on shards. Knows torch and torch.distributed only."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_accel.core.average import Average
    from lightning_accel.core.engine import Engine
    from lightning_accel.core.grad_scaler import GradScaler
    from lightning_accel.core.optimizer import register_by_tensor, register_elementwise
    from lightning_accel.core.placement import ROWS, Rest, Row
    from lightning_accel.core.power_sgd import PowerSGD
    from lightning_accel.core.registry import engine_of
    from lightning_accel.core.report import Report

__all__ = [
    "ROWS",
    "Average",
    "Engine",
    "GradScaler",
    "PowerSGD",
    "Report",
    "Rest",
    "Row",
    "engine_of",
    "register_by_tensor",
    "register_elementwise",
]

_HOMES = {
    "Average": "average",
    "Engine": "engine",
    "GradScaler": "grad_scaler",
    "PowerSGD": "power_sgd",
    "register_by_tensor": "optimizer",
    "register_elementwise": "optimizer",
    "engine_of": "registry",
    "Report": "report",
}
"""Where a name is from, if not from the placement table."""


def __getattr__(name: str) -> Any:
    # The command line reads the table of rows without waiting for torch.
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'placement')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
