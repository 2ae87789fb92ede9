"""Checkpoints as nested dictionaries and lists: tensors are taken out to be saved, and put in again."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.core.checkpoint.shard import Shard
from lightning_accel.core.checkpoint.stored import StoredTensor

Path = tuple[str | int, ...]
"""Keys of dictionaries and indices of lists, from the outermost on."""

_SMALL_BYTES = 2**16
"""Tensors that no rank has a part of go with the objects up to this size."""


def take_tensors(nest: Any, *, keeps_whole: bool = True) -> tuple[dict[Path, Shard], Any]:
    """Take what is stored as tensors out of a checkpoint.

    That is parts of tensors, what is in one dictionary with them (buffers are) unless it is a single number, and other
    large tensors.

    Args:
        nest: The checkpoint.
        keeps_whole: Whether this rank is the one that saves what no rank has a part of.

    Returns:
        The tensors by path, and the checkpoint without them. What was one object at two places is so still.

    """
    found: dict[Path, Shard] = {}
    made: dict[Hashable, Shard] = {}

    def taken(path: Path, value: Any, beside: bool) -> bool:
        """Whether a value is stored as a tensor; then it is noted."""
        if _is_stored(value, beside):
            found[path] = _shard(value, made, keeps_whole)
            return True
        return False

    def walk(value: Any, path: Path) -> Any:
        if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
            beside = any(isinstance(entry, Shard | StoredTensor) for entry in value.values())
            left = {
                key: walk(entry, (*path, key)) for key, entry in value.items() if not taken((*path, key), entry, beside)
            }
            # Users' own kinds of dictionaries stay what they are.
            return value if all(left.get(key, found) is entry for key, entry in value.items()) else left
        if type(value) in (list, tuple):
            walked = [
                None if taken((*path, index), entry, False) else walk(entry, (*path, index))
                for index, entry in enumerate(value)
            ]
            return value if all(map(operator.is_, walked, value)) else type(value)(walked)
        return value

    rest = walk(nest, ())
    return found, rest


def _is_stored(value: Any, beside: bool) -> bool:
    if isinstance(value, Shard | StoredTensor):
        return True
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
        return False
    if value.is_quantized or value.is_nested or value.is_meta:
        return False
    return bool((beside and value.dim() > 0) or value.nbytes > _SMALL_BYTES)


def _shard(entry: Tensor, made: dict[Hashable, Shard], keeps_whole: bool) -> Shard:
    """What stands for a tensor; the same object if it is the same memory."""
    if isinstance(entry, Shard):
        return entry
    identity: Hashable = id(entry)
    if not isinstance(entry, StoredTensor) and entry.numel():
        identity = entry.data_ptr(), entry.shape, entry.stride(), entry.dtype
    if identity not in made:
        made[identity] = Shard.whole(entry) if keeps_whole else Shard(entry.shape, entry.dtype, ())
    return made[identity]


def put_tensors(nest: Any, tensors: Mapping[Path, Any]) -> Any:
    """Put tensors back where ``take_tensors`` has taken them from; where there is nothing, dictionaries are made."""
    for path, tensor in tensors.items():
        nest = _put(nest, path, tensor)
    return nest


def _put(nest: Any, path: Path, tensor: Any) -> Any:
    if not path:
        return tensor
    first, rest = path[0], path[1:]
    if isinstance(nest, list | tuple):
        assert isinstance(first, int)
        changed = [_put(entry, rest, tensor) if index == first else entry for index, entry in enumerate(nest)]
        return type(nest)(changed)
    if nest is None:
        nest = {}
    nest[first] = _put(nest.get(first), rest, tensor)
    return nest


def mapped(nest: Any, change: Callable[[Tensor], Any]) -> Any:
    """A checkpoint with something else in the places of its tensors; what was one tensor stays one."""
    done: dict[int, Any] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in done:
                done[id(value)] = change(value)
            return done[id(value)]
        if isinstance(value, dict):
            return type(value)((key, walk(entry)) for key, entry in value.items()) if type(value) is dict else value
        if type(value) in (list, tuple):
            return type(value)(map(walk, value))
        return value

    return walk(nest)
