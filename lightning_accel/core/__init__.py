"""The engine: sharding, reduction, the optimizer on shards. Knows torch and torch.distributed only."""

from lightning_accel.core.average import Average
from lightning_accel.core.engine import Engine
from lightning_accel.core.grad_scaler import GradScaler
from lightning_accel.core.optimizer import register_elementwise
from lightning_accel.core.placement import ROWS, Rest, Row
from lightning_accel.core.registry import engine_of
from lightning_accel.core.report import Report

__all__ = ["ROWS", "Average", "Engine", "GradScaler", "Report", "Rest", "Row", "engine_of", "register_elementwise"]
