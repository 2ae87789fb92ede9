"""Checkpoint files hold what they name, not the flat buffers it lies in."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_accel.core.checkpoint import StoredTensor


def compact(checkpoint: Any) -> Any:
    """Copy tensors that use only a part of the memory they view.

    Saving a view saves all of the memory behind it, once. For a whole model that is the model and nothing is copied
    here; a state dict with a few parameters picked out would drag whole units along.

    Args:
        checkpoint: Any nest of collections.

    Returns:
        The same nest; it shares all tensors that need no copy.

    """
    used: Counter[int] = Counter()
    seen: set[tuple[int, int, int]] = set()

    def count(tensor: Tensor) -> Tensor:
        if isinstance(tensor, StoredTensor):
            return tensor
        storage = tensor.untyped_storage()
        place = (storage.data_ptr(), int(tensor.storage_offset()), tensor.numel())
        if place not in seen:  # tied parameters are in the file once
            seen.add(place)
            used[storage.data_ptr()] += tensor.numel() * tensor.element_size()
        return tensor

    def compacted(tensor: Tensor) -> Tensor:
        if isinstance(tensor, StoredTensor):
            return tensor
        storage = tensor.untyped_storage()
        # Padding is at most a few KiB a unit; anything more is memory of tensors that are not saved.
        wasteful = storage.nbytes() - used[storage.data_ptr()] > max(4096, storage.nbytes() // 100)
        return tensor.clone() if wasteful else tensor

    apply_to_collection(checkpoint, Tensor, count)
    return with_tensors(checkpoint, compacted)


def with_tensors(nest: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of collections with other tensors.

    Args:
        nest: Its dictionaries keep their class and attributes, such as the versions of modules that a state dict has.
        function: Gives the other tensor.

    """
    if not isinstance(nest, dict):
        return apply_to_collection(nest, Tensor, function)
    made = copy.copy(nest)
    for key, value in nest.items():
        made[key] = with_tensors(value, function)
    return made
