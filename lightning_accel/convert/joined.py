"""Tensors whose elements lie in several places, put together when they are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_accel.core.checkpoint import StoredTensor
from lightning_accel.core.checkpoint.boxes import Box


def join(name: str, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """A tensor that consists of parts.

    Args:
        name: Of the tensor, for messages.
        parts: At least one, 1-D, of one dtype: its elements, end to end. They may be mapped files.
        shape: Of the tensor.

    Returns:
        A view if there is one part only, else a ``StoredTensor``.

    """
    assert sum(part.numel() for part in parts) == math.prod(shape), "parts of another tensor"
    filled = [part.detach() for part in parts if part.numel()] or [parts[0].detach()]
    if len(filled) == 1:
        return filled[0].view(tuple(shape))
    return StoredTensor(cast(Any, _Joined(filled, shape)), name, shape, filled[0].dtype)


class _Joined:
    """What a ``StoredTensor`` reads from."""

    def __init__(self, parts: Sequence[Tensor], shape: Sequence[int]) -> None:
        self._parts = parts
        self._whole = Box.whole(shape)

    def boxes(self, key: str) -> list[Box]:
        """It is read as a whole."""
        return [self._whole]

    def fill(self, key: str, targets: Sequence[tuple[Box, Tensor]]) -> None:
        """Write boxes of the tensor to other tensors. See ``StoredTensor.fill``."""
        for box, target in targets:
            if box == self._whole and target.dtype == self._parts[0].dtype and target.is_contiguous():
                torch.cat(list(self._parts), out=target.view(-1))
            else:
                target.copy_(box.of(torch.cat(list(self._parts)).view(self._whole.sizes)))
