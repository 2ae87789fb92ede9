"""Checkpoints as the tests compare them: one dictionary of tensors in memory, whichever way they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_accel.core.checkpoint import load
from lightning_accel.strategies.stock import whole


def opened(path: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """What a file or a directory holds."""
    if Path(path).is_dir():
        return whole(load(path, weights_only=weights_only))
    return torch.load(path, weights_only=weights_only)


def full(row: str) -> Any:
    """The Trainer's strategy of a row, saving whole checkpoints."""
    return _full(StrategyRegistry[f"accel_{row}"])


def full_in_fabric(row: str) -> Any:
    """The same for Fabric."""
    return _full(STRATEGY_REGISTRY[f"accel_{row}"])


def _full(entry: dict[str, Any]) -> Any:
    return entry["strategy"](**entry["init_params"], state_dict_type="full")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return sum(entry.stat().st_size for entry in (path.iterdir() if path.is_dir() else [path]))
