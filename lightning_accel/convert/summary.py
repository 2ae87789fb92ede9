"""What is in a checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_accel.convert.contents import is_model, optimizers_in
from lightning_accel.convert.formats import find_format


@dataclass(frozen=True)
class TensorSummary:
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How large it is."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class OptimizerSummary:
    """One optimizer."""

    name: str
    """Its place in the checkpoint: ``optimizer_states.0``."""
    groups: int
    parameters: int
    by_name: bool
    """Whether its parameters have names; else numbers, in the order of its groups."""
    states: dict[str, list[TensorSummary]]
    """What is kept of each parameter."""


@dataclass(frozen=True)
class Summary:
    """A checkpoint."""

    path: Path
    format: str
    writer: str
    """Who wrote it."""
    world_size: int | None
    """How many ranks have written it; None if it does not say."""
    epoch: int | None
    step: int | None
    """Optimizer steps; None if it does not say."""
    tensors: list[TensorSummary]
    """Of models."""
    optimizers: list[OptimizerSummary]
    others: list[str]
    """What else there is."""
    left_out: list[str] = field(default_factory=list)
    """What a conversion would leave out, and why."""
    disk_bytes: int = 0
    """Of all its files."""

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors of models and optimizers; those that are tied count under each name."""
        states = [entry for optimizer in self.optimizers for state in optimizer.states.values() for entry in state]
        return sum(entry.nbytes for entry in (*self.tensors, *states))


def inspect(path: str | os.PathLike[str], *, weights_only: bool = True) -> Summary:
    """Look into a checkpoint of any format that ``convert`` reads. No tensor's values are read.

    Args:
        path: Of the checkpoint.
        weights_only: See ``convert``.

    Raises:
        ValueError: If it is none, is damaged, or holds what is refused.
        FileNotFoundError: If there is nothing.

    """
    kind, found = find_format(Path(path))
    contents = kind.open(found, weights_only=weights_only)
    nest = contents.nest
    models: dict[str, Mapping[str, Any]] = {}
    if is_model(nest):
        models[""] = nest
    else:
        models |= {
            key: value
            for key, value in nest.items()
            if is_model(value) or (key == "state_dict" and isinstance(value, Mapping))
        }
    several = len(models) > 1
    tensors = [
        _tensor(f"{key}.{name}" if several else name, entry)
        for key, model in models.items()
        for name, entry in model.items()
        if isinstance(entry, Tensor)
    ]
    optimizers = {".".join(map(str, place)): state for place, state in optimizers_in(nest).items()}
    shown = {*models, *(place.split(".")[0] for place in optimizers), "epoch", "global_step"}
    return Summary(
        Path(path),
        kind.name,
        contents.writer,
        contents.world_size,
        _whole(nest.get("epoch")),
        _whole(nest.get("global_step", nest.get("step"))),
        tensors,
        [_optimizer(name, state) for name, state in optimizers.items()],
        [] if is_model(nest) else [str(key) for key in nest if key not in shown],
        contents.left_out,
        _disk_bytes(found),
    )


def _tensor(name: str, tensor: Tensor) -> TensorSummary:
    return TensorSummary(name, tuple(tensor.shape), tensor.dtype)


def _optimizer(name: str, state: Mapping[str, Any]) -> OptimizerSummary:
    parameters = [parameter for group in state["param_groups"] for parameter in group["params"]]
    by_name = all(isinstance(parameter, str) for parameter in parameters)
    states = {
        str(parameter): [_tensor(key, value) for key, value in entry.items() if isinstance(value, Tensor)]
        for parameter, entry in state["state"].items()
    }
    return OptimizerSummary(name, len(state["param_groups"]), len(parameters), by_name, states)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _disk_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
