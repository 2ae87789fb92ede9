"""The step that optimizers here have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.optimizers.batches import batches


class BatchedOptimizer(Optimizer):
    """Updates as many parameters at a time as one call of torch's foreach functions can."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step.

        Args:
            closure: Computes gradients again and returns the loss.

        Returns:
            What ``closure`` has returned.

        Raises:
            ValueError: If a parameter is complex, or a gradient sparse.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for batch in batches(group["params"], self._kind):
                self._update(batch, group)
        return loss

    def _kind(self, parameter: Tensor) -> Hashable:
        """What parameters that are updated together have alike, besides device and dtypes."""
        return None

    @abstractmethod
    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one group that have gradients."""
