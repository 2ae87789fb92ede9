"""Optimizers that update many parameters at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_accel.optimizers.batches import batches
from lightning_accel.optimizers.grouped import GroupedOptimizer


class BatchedOptimizer(GroupedOptimizer):
    """Updates as many parameters at a time as one call of torch's foreach functions can."""

    @override
    def _update_group(self, group: dict[str, Any]) -> None:
        for batch in batches(group["params"], self._kind):
            self._update(batch, group)

    def _kind(self, parameter: Tensor) -> Hashable:
        """What parameters that are updated together have alike, besides device and dtypes."""
        return None

    @abstractmethod
    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one group that have gradients."""
