"""Values of a Trainer's checkpoint, between the devices and host memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_accel.core.xla.moving import to_host
from lightning_accel.strategies.compact import with_tensors


def fetched(nest: Any) -> Any:
    """The same nest of collections with its tensors in host memory, whole. What was one tensor stays one."""
    tensors: dict[int, Tensor] = {}

    def collect(tensor: Tensor) -> Tensor:
        tensors[id(tensor)] = tensor
        return tensor

    with_tensors(nest, collect)
    values = dict(zip(tensors, to_host(list(tensors.values())), strict=True))
    return with_tensors(nest, lambda tensor: values[id(tensor)])


def with_scores_on(device: torch.device, callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """States of callbacks whose ``ModelCheckpoint`` can compare the scores it had with new ones, which it does there.

    Args:
        device: Where metrics are computed.
        callbacks: States by key.

    """
    return {
        key: with_tensors(state, lambda score: score.to(device))
        if isinstance(state, Mapping) and "best_k_models" in state
        else state
        for key, state in callbacks.items()
    }
