"""Nested structures of tensors: dictionaries, lists, tuples and named tuples. Nothing here talks to other ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

Path = str
"""Where something is in a structure, as it would be written after its name: ``['loss'][0]``."""


def map_leaves(data: Any, function: Callable[[Path, Any], Any], path: Path = "") -> Any:
    """The same structure, with something else in place of each leaf.

    Args:
        data: The structure, or a leaf.
        function: Called with the path of each leaf and the leaf: all that is no mapping, list or tuple.
        path: Of ``data``.

    """
    if isinstance(data, Mapping):
        values = {key: map_leaves(value, function, f"{path}[{key!r}]") for key, value in data.items()}
        if type(data) is dict or not isinstance(data, MutableMapping):
            return values
        made = copy.copy(data)  # it may have more than its items, as transformers' outputs do
        for key, value in values.items():
            made[key] = value
        return made
    if isinstance(data, (list, tuple)):
        entries = [map_leaves(value, function, f"{path}[{index}]") for index, value in enumerate(data)]
        return type(data)(*entries) if hasattr(data, "_fields") else type(data)(entries)
    return function(path, data)


def leaves(data: Any) -> dict[Path, Any]:
    """All leaves by their paths, in order."""
    found: dict[Path, Any] = {}
    map_leaves(data, found.__setitem__)
    return found


def map_tensors(data: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same structure, with something else in place of each tensor; other leaves stay."""
    return map_leaves(data, lambda _, leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def described(data: Any) -> dict[Path, str]:
    """Dtype and shape of each tensor, by path: ``{"['x']": "float32 [2, 3]"}``. Of other leaves the type."""
    return {path: _described(leaf) for path, leaf in leaves(data).items()}


def _described(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"


def require_tensors(doing: str, data: Any) -> None:
    """Raise if there is anything but tensors.

    Args:
        doing: What they are needed for.
        data: A structure.

    Raises:
        TypeError: Names the leaves.

    """
    wrong = {path: leaf for path, leaf in leaves(data).items() if not isinstance(leaf, Tensor)}
    if wrong:
        said = ", ".join(f"{type(leaf).__name__}{' at ' + path if path else ''}" for path, leaf in wrong.items())
        raise TypeError(
            f"Expected tensors, and dictionaries, lists and tuples of them, to {doing}, got {said}. Other objects:"
            " accelerator.gather_object(...)."
        )


def first_samples(data: Any, count: int) -> Any:
    """The first samples of each tensor, and of a list of objects."""
    return map_tensors(data, lambda tensor: tensor[:count])


def padded(tensor: Tensor, size: int, dim: int, value: float, *, first: bool) -> Tensor:
    """A tensor that is longer.

    Args:
        tensor: Any shape.
        size: What it is to have along ``dim``.
        dim: Which dimension; may be negative.
        value: What is added.
        first: Add before instead of after.

    """
    have = tensor.shape[dim]
    if have == size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size
    made = tensor.new_full(shape, value)
    made.narrow(dim, size - have if first else 0, have).copy_(tensor)
    return made


def share(inputs: Any, rank: int, ranks: int, *, pad: bool = False) -> Any:
    """One rank's part of a sequence: neighbouring entries, the first ranks with one more if it does not divide evenly.

    Args:
        inputs: A list, tuple or tensor, a dictionary of these that are equally long, or what has ``select`` (a
            ``datasets.Dataset``). It is left as it is.
        rank: Whose part.
        ranks: How many parts.
        pad: Repeat the last entry so that all parts are equally long.

    Raises:
        ValueError: If the values of a dictionary differ in length, or there is nothing to repeat.
        TypeError: If it is something else.

    """
    if isinstance(inputs, Mapping):
        lengths = {key: len(value) for key, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Expected values of one length to split between processes, got lengths {lengths}.")
        return {key: share(value, rank, ranks, pad=pad) for key, value in inputs.items()}
    is_selectable = hasattr(inputs, "select") and hasattr(inputs, "__len__")
    if isinstance(inputs, str) or not isinstance(inputs, (Tensor, Sequence)) and not is_selectable:
        raise TypeError(
            "Expected a list, tuple, tensor, dataset or dictionary of these to split between processes, got"
            f" {type(inputs).__name__}."
        )
    if pad and not len(inputs) and ranks > 1:
        raise ValueError("Expected at least one entry to repeat with apply_padding=True, got none.")
    each, more = divmod(len(inputs), ranks)
    start = rank * each + min(rank, more)
    mine = list(range(start, start + each + (rank < more)))
    if pad:
        mine += [len(inputs) - 1] * (each + (more > 0) - len(mine))
    if isinstance(inputs, Tensor):
        return inputs[torch.tensor(mine, dtype=torch.long, device=inputs.device)]
    if is_selectable and not isinstance(inputs, (list, tuple)):
        return inputs.select(mine)
    if isinstance(inputs, (list, tuple)) and not hasattr(inputs, "_fields"):
        return type(inputs)(inputs[index] for index in mine)
    return [inputs[index] for index in mine]
