"""What batches are made of: tensors in lists, tuples, dictionaries, dataclasses and the like."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorShape:
    """What stands in for a tensor where a batch's structure is sent without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        """A tensor like it."""
        return torch.empty(self.shape, dtype=self.dtype)


def map_leaves(function: Callable[[Any], Any], *batches: Any) -> Any:
    """A batch whose leaves are what a function makes of the leaves of batches of one structure.

    Args:
        function: Called with a leaf of each batch: whatever is no list, tuple, mapping or dataclass, and lists and
            tuples of which no item is a tensor or holds some (of texts, say).
        batches: At least one.

    """
    first = batches[0]
    if isinstance(first, MutableMapping) or type(first) is dict:
        made = copy.copy(first)  # keeps what classes such as BatchEncoding have beside their items
        for key in first:
            made[key] = map_leaves(function, *[batch[key] for batch in batches])
        return made
    if isinstance(first, Mapping):
        return {key: map_leaves(function, *[batch[key] for batch in batches]) for key in first}
    if isinstance(first, (list, tuple)) and not _is_plain(first):
        items = [map_leaves(function, *parts) for parts in zip(*batches, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if dataclasses.is_dataclass(first) and not isinstance(first, (type, TensorShape)):
        record = copy.copy(first)
        for field in dataclasses.fields(first):
            value = map_leaves(function, *[getattr(batch, field.name) for batch in batches])
            object.__setattr__(record, field.name, value)
        return record
    return function(*batches)


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, always in the same order."""
    found: list[Tensor] = []
    map_leaves(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, batch)
    return found


def outline(batch: Any) -> Any:
    """A batch with a ``TensorShape`` in the place of each tensor."""
    return map_leaves(
        lambda leaf: TensorShape(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf, batch
    )


def filled(outlined: Any, tensors: Sequence[Tensor]) -> Any:
    """The batch of an outline."""
    rest = iter(tensors)
    return map_leaves(lambda leaf: next(rest) if isinstance(leaf, TensorShape) else leaf, outlined)


def to_device(batch: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """A batch with its tensors on a device; also what else has a method ``to``."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=non_blocking)
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    if callable(getattr(batch, "to", None)) and not isinstance(batch, Tensor):  # such as BatchEncoding, PackedSequence
        return batch.to(device)
    return map_leaves(move, batch)


def samples_of(batch: Any) -> int:
    """How many samples there are in a batch: the size of its tensors' first dimension; without these, of its lists.

    Raises:
        ValueError: If there are neither, or they differ in size.

    """
    sizes = {tensor.size(0) for tensor in tensors_of(batch) if tensor.dim()}
    if not sizes:
        map_leaves(lambda leaf: sizes.add(len(leaf)) if isinstance(leaf, (list, tuple)) else None, batch)
    if len(sizes) != 1:
        raise ValueError(
            "Expected the tensors of a batch to be of one size in their first dimension, the samples, got"
            f" {sorted(sizes) or 'no tensor'}: nobody can tell the samples apart. Use dispatch_batches=False, or"
            " drop_last=True and split_batches=False."
        )
    return sizes.pop()


def samples(batch: Any, start: int, stop: int) -> Any:
    """Some of a batch's samples: parts of its tensors, and of lists with an item for each sample."""
    size = samples_of(batch)

    def part(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[start:stop] if leaf.dim() else leaf
        return leaf[start:stop] if isinstance(leaf, (list, tuple)) and len(leaf) == size else leaf

    return map_leaves(part, batch)


def joined_samples(batches: Sequence[Any]) -> Any:
    """One batch of the samples of several of one structure.

    Raises:
        ValueError: If they do not fit together.

    """
    if len(batches) == 1:
        return batches[0]
    sizes = [samples_of(batch) for batch in batches]

    def cat(*leaves: Any) -> Any:
        first = leaves[0]
        if isinstance(first, Tensor):
            return torch.cat(leaves) if first.dim() else first
        lists = isinstance(first, (list, tuple))
        if lists and [len(leaf) for leaf in leaves] == sizes:
            return type(first)(item for leaf in leaves for item in leaf)
        return first

    try:
        return map_leaves(cat, *batches)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            "Expected batches whose samples fit together, to complete the last one with samples from the start of the"
            f" epoch: {error}. Use drop_last=True, even_batches=False or dispatch_batches=False."
        ) from error


def _is_plain(value: Sequence[Any]) -> bool:
    """Whether a list or tuple is data, not structure."""
    return not any(
        isinstance(item, (Tensor, TensorShape, list, tuple, Mapping)) or dataclasses.is_dataclass(item)
        for item in value
    )
