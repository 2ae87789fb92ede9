"""Lightning's own loading reads our checkpoint directories, too: ``load_from_checkpoint``, and other strategies.

Lightning opens every checkpoint with one function, which two of its modules have by a name of their own. Directories
that have our manifest are opened here; everything else goes its usual way.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.plugins.io import torch_io
from lightning.pytorch.core import saving
from torch import Tensor

from lightning_accel.core.checkpoint import StoredTensor, is_directory, load
from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.manifest import MANIFEST_FILE
from lightning_accel.core.checkpoint.nest import mapped


def teach() -> None:
    """Have Lightning open directories, from now on in this process."""
    for module in (saving, torch_io):
        if not hasattr(module.pl_load, "opens_directories"):
            module.pl_load = _opening(module.pl_load)  # type: ignore[attr-defined]


def _opening(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def opened(path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        ours = isinstance(path, str | os.PathLike) and is_directory(path) and Folder(path).size(MANIFEST_FILE)
        if not ours:
            return original(path, map_location=map_location, weights_only=weights_only)
        device = map_location if isinstance(map_location, str | torch.device) else "cpu"
        return whole(load(path, weights_only=weights_only is not False), device)

    opened.opens_directories = True  # type: ignore[attr-defined]
    return opened


def whole(checkpoint: dict[str, Any], device: str | torch.device = "cpu") -> dict[str, Any]:
    """A checkpoint as torch and Lightning know it: tensors in memory, numbers for the parameters of optimizers."""

    def read(value: Tensor) -> Tensor:
        return value.full().to(device) if isinstance(value, StoredTensor) else value.to(device)

    found: dict[str, Any] = _numbered(mapped(checkpoint, read))
    return found


def _numbered(nest: Any) -> Any:
    """Numbers instead of names in all states of optimizers. They count through the groups, as torch's."""
    if isinstance(nest, list):
        return [_numbered(entry) for entry in nest]
    if not isinstance(nest, Mapping):
        return nest
    if nest.keys() >= {"state", "param_groups"}:
        names = [name for group in nest["param_groups"] for name in group["params"]]
        number = {name: index for index, name in enumerate(names)}
        state = {number.get(name, name): values for name, values in nest["state"].items()}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in nest["param_groups"]]
        return {**nest, "state": state, "param_groups": groups}
    return {key: _numbered(entry) for key, entry in nest.items()}
