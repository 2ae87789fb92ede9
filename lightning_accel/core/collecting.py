"""Optimizer state that rank 0 puts together tensor by tensor, while it writes a file.

[Note: collected when its turn comes]
Optimizer state is often twice the model. A checkpoint of one file would have all of it in rank 0's memory; so there its
tensors are ``StoredTensor``, whose values are sent by the ranks that have them when they are asked for, and are
forgotten when they are written. Until then the other ranks wait to be told which is next::

    rank 0, which writes      fill(7): "7"  --->  puts together 7      fill(8): "8"  --->  ...     "no more"
    the others                         "7"  --->  send their parts              "8"  --->  ...     "no more"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_accel.core.checkpoint.boxes import Box
from lightning_accel.core.checkpoint.stored import StoredTensor
from lightning_accel.core.collectives import Collectives

T = TypeVar("T")

_NO_MORE = -1


class Collecting:
    """The tensors of one checkpoint. All ranks add the same ones in the same order.

    Args:
        ranks: All ranks.

    """

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._jobs: list[Callable[[], Tensor | None]] = []
        self._shapes: list[Sequence[int]] = []
        self._is_running = False

    def add(self, job: Callable[[], Tensor | None], shape: Sequence[int], dtype: torch.dtype) -> StoredTensor:
        """Add a tensor.

        Args:
            job: All ranks do it at the same time; it returns the values on rank 0.
            shape: Of the values.
            dtype: Of the values.

        """
        self._jobs.append(job)
        self._shapes.append(shape)
        return StoredTensor(self, str(len(self._jobs) - 1), shape, dtype)

    def run(self, action: Callable[[], T]) -> T | None:
        """Do something on rank 0 that may use the tensors' values; the other ranks help. All ranks call this together.

        Returns:
            What the action returns, on rank 0.

        """
        if not self._jobs:
            return action() if self._ranks.rank == 0 else None
        if self._ranks.rank != 0:
            while (number := self._tell(_NO_MORE)) != _NO_MORE:
                self._jobs[number]()
            return None
        self._is_running = True
        try:
            return action()
        finally:
            self._is_running = False
            self._tell(_NO_MORE)

    def boxes(self, key: str) -> list[Box]:
        """For ``StoredTensor``: all of a tensor is put together at once."""
        return [Box.whole(self._shapes[int(key)])]

    def fill(self, key: str, targets: Sequence[tuple[Box, Tensor]]) -> None:
        """For ``StoredTensor``.

        Raises:
            RuntimeError: If other ranks do not wait to be asked.

        """
        if not self._is_running:
            raise RuntimeError(
                "Expected optimizer state that is about to be saved not to be looked at, as other ranks have parts of"
                " it. Use the optimizer's state_dict(), on all ranks."
            )
        values = self._jobs[self._tell(int(key))]()
        assert values is not None
        for box, target in targets:
            target.copy_(box.of(values))

    def _tell(self, number: int) -> int:
        """Tell the other ranks, or hear from rank 0."""
        told = torch.tensor([number], device=self._ranks.device)
        self._ranks.broadcast(told)
        return int(told.item())
