"""Directories of torch.distributed.checkpoint: ours, Lightning's, and torch's own.

Lightning's strategies write ``{"model" (FSDPStrategy) or "state_dict" (ModelParallelStrategy): …, "optimizer_0": …}``
with the rest of the Trainer's dictionary in ``meta.pt``; Fabric's write the user's own names and ``meta.pt``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightning_accel.convert.contents import Contents, is_model, is_optimizer, optimizers_in
from lightning_accel.convert.lightning_ckpt import VERSION_KEY, writer_of
from lightning_accel.convert.trusted import load_file
from lightning_accel.core.checkpoint import Reader, StoredTensor, load, open_dcp, save
from lightning_accel.core.checkpoint.boxes import Box
from lightning_accel.core.checkpoint.manifest import MANIFEST_FILE
from lightning_accel.core.checkpoint.metadata import METADATA_FILE
from lightning_accel.core.checkpoint.reader import OBJECTS_FILE
from lightning_accel.core.checkpoint.streamed_save import identity

_OPTIMIZER = re.compile(r"optimizer_(\d+)")
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp")


def is_ours(path: Path) -> bool:
    """Whether it is a checkpoint directory of lightning_accel, or was to be one."""
    return (path / MANIFEST_FILE).is_file()


def is_others(path: Path) -> bool:
    """Whether it is a directory of torch.distributed.checkpoint."""
    return (path / METADATA_FILE).is_file()


def open_ours(path: Path, *, weights_only: bool = True) -> Contents:
    """Open a checkpoint directory of lightning_accel.

    Args:
        path: Of the directory.
        weights_only: Refuse everything but tensors, numbers, strings and their collections.

    Raises:
        ValueError: If it is not whole, or holds what is refused.

    """
    manifest = Reader(path).manifest
    assert manifest is not None
    info = manifest.info
    notes = [info.get("row"), f"torch {info['torch']}", info["created"]]
    if "converted_from" in info:
        notes.insert(0, f"converted from {info['converted_from']}")
    writer = f"lightning-accel {info['lightning_accel']} ({', '.join(note for note in notes if note)})"
    return Contents(load(path, weights_only=weights_only), writer, int(info["world_size"]))


def open_others(path: Path, *, weights_only: bool = True) -> Contents:
    """Open a directory that Lightning or torch itself has written.

    Args:
        path: Of the directory.
        weights_only: Refuse everything but tensors, numbers, strings and their collections.

    Raises:
        ValueError: If it is damaged, or holds what is refused.

    """
    nest = {key: _with_numbers(value) for key, value in open_dcp(path, weights_only=weights_only).items()}
    extra = path / OBJECTS_FILE
    rest = load_file(extra, weights_only=weights_only) if extra.is_file() else {}
    if not isinstance(rest, Mapping):
        raise ValueError(f"Expected {extra} to hold a dictionary, as Lightning's does, got a {type(rest).__name__}.")
    if VERSION_KEY in rest:
        nest = _trainer_nest(nest)
    nest |= rest
    ranks = {int(match[1]) for entry in path.iterdir() if (match := _RANK_FILE.fullmatch(entry.name))}
    return Contents(nest, writer_of(rest, "torch.distributed.checkpoint"), max(ranks) + 1 if ranks else None)


def _with_numbers(value: Any) -> Any:
    """An optimizer with the numbers of parameters that it had: torch has made strings of a dictionary's keys."""
    if not is_optimizer(value) or any(
        isinstance(key, str) for group in value["param_groups"] for key in group["params"]
    ):
        return value
    return {**value, "state": {int(key): state for key, state in value["state"].items()}}


def _trainer_nest(nest: Mapping[str, Any]) -> dict[str, Any]:
    """The Trainer's dictionary, of what its strategies make of it."""
    changed: dict[str, Any] = {}
    optimizers: dict[int, Any] = {}
    for key, value in nest.items():
        if (match := _OPTIMIZER.fullmatch(key)) and is_optimizer(value):
            optimizers[int(match[1])] = value
        elif key == "model" and "state_dict" not in nest and is_model(value):
            changed["state_dict"] = value
        else:
            changed[key] = value
    changed["optimizer_states"] = [optimizers[index] for index in sorted(optimizers)]
    return changed


def save_ours(path: Path, nest: Mapping[str, Any], info: Mapping[str, Any], done: Callable[[int], None]) -> None:
    """Write a checkpoint directory of lightning_accel, tensor by tensor.

    Args:
        path: Of the directory.
        nest: What to write.
        info: What its manifest is to say besides.
        done: Called with the bytes of each tensor when it is read.

    Raises:
        ValueError: If there is something that cannot be saved.
        OSError: If it cannot be written.

    """
    turn = _Turn(done)
    if is_model(nest):
        changed = turn.taking(nest)
    else:
        states = {key for key, value in nest.items() if is_model(value)} | {"state_dict"}
        states |= {str(path[0]) for path in optimizers_in(nest)}
        changed = {key: turn.taking(value) if key in states else value for key, value in nest.items()}
    save(path, changed, info=dict(info))


class _Turn:
    """The one tensor that is in memory: it is written in parts, and would be read for each of them."""

    def __init__(self, done: Callable[[int], None]) -> None:
        self._done = done
        self._made: dict[tuple[Any, ...], StoredTensor] = {}
        self._key = ""
        self._sources: dict[str, Tensor] = {}
        self._values = torch.empty(0)

    def taking(self, nest: Any) -> Any:
        """With tensors that take their turn when they are written."""
        if isinstance(nest, Mapping):
            return {key: self.taking(value) for key, value in nest.items()}
        if type(nest) in (list, tuple):
            return type(nest)(map(self.taking, nest))
        return self._taking(nest) if isinstance(nest, Tensor) else nest

    def _taking(self, tensor: Tensor) -> Tensor:
        """Single numbers, and what is not dense, go with what is no tensor."""
        if not tensor.dim() or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            return tensor
        if (same := identity(tensor)) not in self._made:
            key = str(len(self._sources))
            self._sources[key] = tensor
            self._made[same] = StoredTensor(cast(Any, self), key, tensor.shape, tensor.dtype)
        return self._made[same]

    def fill(self, key: str, targets: Sequence[tuple[Box, Tensor]]) -> None:
        """Write boxes of a tensor to other tensors. See ``StoredTensor.fill``."""
        if key != self._key:
            source = self._sources[key]
            self._values = torch.empty(0)
            self._key, self._values = key, source.full() if isinstance(source, StoredTensor) else source.detach()
            self._done(source.nbytes)
        for box, target in targets:
            target.copy_(box.of(self._values))
