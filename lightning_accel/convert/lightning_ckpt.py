"""Checkpoints of one file: Lightning's ``.ckpt``, and whatever else ``torch.save`` has written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_accel.convert.contents import Contents, lightning_version, optimizers_in
from lightning_accel.convert.output import new_file
from lightning_accel.convert.trusted import load_file
from lightning_accel.core.checkpoint.streamed_save import streamed_save

VERSION_KEY = "pytorch-lightning_version"


def open_ckpt(path: Path, *, weights_only: bool = True) -> Contents:
    """Open a checkpoint of one file.

    Args:
        path: Of the file.
        weights_only: Refuse everything but tensors, numbers, strings and their collections.

    Raises:
        ValueError: If it is none, is damaged, or holds what is refused.

    """
    nest = load_file(path, weights_only=weights_only)
    if not isinstance(nest, Mapping):
        raise ValueError(f"Expected {path} to hold a dictionary, as checkpoints do, got a {type(nest).__name__}.")
    return Contents(dict(nest), writer_of(nest, "torch.save"))


def writer_of(nest: Mapping[str, Any], otherwise: str) -> str:
    """Who has written what a checkpoint holds."""
    return f"Lightning {nest[VERSION_KEY]}" if VERSION_KEY in nest else otherwise


def save_ckpt(path: Path, nest: Mapping[str, Any], done: Callable[[int], None]) -> None:
    """Write a checkpoint of one file, tensor by tensor.

    Optimizers' parameters are numbered, as torch does it: those of the first group in order, then the second's, ….

    Args:
        path: Of the file.
        nest: What to write.
        done: Called with the bytes of each tensor that is written.

    Raises:
        ValueError: If a tensor is of a kind that has more than values.
        OSError: If it cannot be written.

    """
    with new_file(path) as stream:
        streamed_save(complete(numbered(nest)), stream, done)


def complete(nest: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with what Lightning needs to load its model."""
    return {VERSION_KEY: lightning_version(), **nest} if "state_dict" in nest else dict(nest)


def numbered(nest: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint whose optimizers have numbers for parameters, where they had names."""
    changed = dict(nest)
    for path, optimizer in optimizers_in(nest).items():
        names = [name for group in optimizer["param_groups"] for name in group["params"]]
        number = {name: index for index, name in enumerate(names)}
        made = {
            **optimizer,
            "state": {number.get(name, name): state for name, state in optimizer["state"].items()},
            "param_groups": [
                {**group, "params": [number[name] for name in group["params"]]} for group in optimizer["param_groups"]
            ],
        }
        if len(path) == 1:
            changed[str(path[0])] = made
        else:
            key, index = path
            changed[str(key)] = [made if at == index else entry for at, entry in enumerate(changed[str(key)])]
    return changed
