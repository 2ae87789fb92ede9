"""What a checkpoint holds, whatever format it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from torch import Tensor

Path = tuple[str | int, ...]
"""Keys of dictionaries and indices of lists, from the outermost on."""


@dataclass
class Contents:
    """A checkpoint that has been opened."""

    nest: dict[str, Any]
    """As the Trainer knows it: ``state_dict``, ``optimizer_states``, …; or what else was saved. Large tensors are read
    when they are used."""
    writer: str
    """Who wrote it."""
    world_size: int | None = None
    """How many ranks have written it; None if it does not say."""
    left_out: list[str] = field(default_factory=list)
    """What of it is not in ``nest``, and why."""


def lightning_version() -> str:
    """The one installed, as checkpoints say it."""
    return version("lightning")


def is_optimizer(value: Any) -> bool:
    """Whether something is the state of an optimizer, as ``Optimizer.state_dict`` returns it."""
    return isinstance(value, Mapping) and isinstance(value.get("state"), Mapping) and "param_groups" in value


def is_model(value: Any) -> bool:
    """Whether something is the state of a model: tensors by name."""
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(entry, Tensor) for entry in value.values())


def optimizers_in(nest: Mapping[str, Any]) -> dict[Path, Mapping[str, Any]]:
    """The optimizer states of a checkpoint, by their paths: the Trainer's list, or Fabric's by name."""
    found: dict[Path, Mapping[str, Any]] = {}
    for key, value in nest.items():
        if is_optimizer(value):
            found[(key,)] = value
        elif isinstance(value, list):
            found |= {(key, index): entry for index, entry in enumerate(value) if is_optimizer(entry)}
    return found


def model_in(nest: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The state of a checkpoint's model, by name.

    Args:
        nest: The checkpoint.
        where: Its path, for messages.

    Returns:
        Tensors, and what modules have added as their extra state.

    Raises:
        ValueError: If there is none, or more than one.

    """
    if isinstance(nest.get("state_dict"), Mapping):
        return nest["state_dict"]
    if is_model(nest):
        return nest
    models = {key: value for key, value in nest.items() if is_model(value)}
    if len(models) != 1:
        raise ValueError(
            f"Expected {where} to hold one model, as 'state_dict' or as the only dictionary of tensors, got"
            f" {sorted(models) or 'none'} among {sorted(map(str, nest))}."
        )
    return next(iter(models.values()))


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All that is no dictionary, list or tuple, with its path."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from walk(entry, (*path, key))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from walk(entry, (*path, index))
    else:
        yield path, value
