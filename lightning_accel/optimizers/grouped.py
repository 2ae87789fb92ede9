"""The step that optimizers here have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim import Optimizer
from typing_extensions import override


class GroupedOptimizer(Optimizer):
    """Updates one parameter group after the other."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all groups.

        Args:
            closure: Computes gradients again and returns the loss.

        Returns:
            What ``closure`` has returned.

        Raises:
            ValueError: If the optimizer cannot update one of the parameters, because it is complex, say.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update_group(group)
        return loss

    @abstractmethod
    def _update_group(self, group: dict[str, Any]) -> None:
        """Update those parameters of a group that have gradients."""
