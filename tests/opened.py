"""Checkpoints as the tests compare them: one dictionary of tensors in memory, whichever way they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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
    entry = StrategyRegistry[f"accel_{row}"]
    return entry["strategy"](**entry["init_params"], state_dict_type="full")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return sum(entry.stat().st_size for entry in (path.iterdir() if path.is_dir() else [path]))
