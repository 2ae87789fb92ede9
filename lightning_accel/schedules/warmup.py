"""A learning rate that grows to begin with; then it stays, or falls in a line or a cosine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.schedules.schedule import Schedule, by_group, require_number


class WarmupLR(Schedule):
    """The learning rate grows from one value to another and stays there, as DeepSpeed's ``WarmupLR``.

    In the n-th optimizer step after the first it has gone ``log(n) / log(warmup_num_steps)`` of the way, or, linearly,
    ``(n - 1) / warmup_num_steps``. The first two steps have ``warmup_min_lr``.

    Args:
        optimizer: Whose learning rates are set.
        warmup_min_lr: The first learning rate, for all parameter groups or for each.
        warmup_max_lr: The last one, likewise. None: what the optimizer was made with (``initial_lr`` of its groups).
        warmup_num_steps: Optimizer steps in between; 2 if it is 1.
        warmup_type: "log" grows quickly at first, "linear" evenly.
        last_batch_iteration: See ``Schedule``.

    Raises:
        ValueError: If a setting is out of range.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = by_group(optimizer, "warmup_min_lr", warmup_min_lr)
        self.max_lrs = None if warmup_max_lr is None else by_group(optimizer, "warmup_max_lr", warmup_max_lr)
        self.warmup_num_steps = _warmup_steps(warmup_num_steps, warmup_type)
        self.warmup_type = warmup_type
        super().__init__(optimizer, last_batch_iteration)

    @override
    def rates(self, done: int) -> list[float | Tensor]:
        way = self._way(max(0, done - 1))
        highs = self.base_lrs if self.max_lrs is None else self.max_lrs
        return [low + (high - low) * way for low, high in zip(self.min_lrs, highs, strict=True)]

    def _way(self, iteration: int) -> float:
        """How far the rate is from the lowest to the highest one."""
        if iteration < self.warmup_num_steps:
            return _grown(iteration, self.warmup_num_steps, self.warmup_type)
        return 1.0


class WarmupDecayLR(WarmupLR):
    """After the warm-up the learning rate falls in a line, as DeepSpeed's ``WarmupDecayLR``.

    It falls from ``warmup_max_lr`` to ``warmup_min_lr``, which it has from optimizer step ``total_num_steps + 2`` on.

    Args:
        optimizer: Whose learning rates are set.
        total_num_steps: Optimizer steps of the whole training. If there are fewer than ``warmup_num_steps``, which is
            warned of, the rate falls at once after the warm-up.
        warmup_min_lr: The first and last learning rate, for all parameter groups or for each.
        warmup_max_lr: The highest, likewise. None: what the optimizer was made with (``initial_lr`` of its groups).
        warmup_num_steps: Optimizer steps of the warm-up; 2 if it is 1.
        warmup_type: "log" grows quickly at first, "linear" evenly.
        last_batch_iteration: See ``Schedule``.

    Raises:
        ValueError: If a setting is out of range.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = _total_steps(total_num_steps, warmup_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    @override
    def _way(self, iteration: int) -> float:
        if iteration < self.warmup_num_steps:
            return super()._way(iteration)
        left = self.total_num_steps - iteration
        return max(0.0, left / max(1, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(Schedule):
    """After the warm-up the learning rate falls in a cosine, as DeepSpeed's ``WarmupCosineLR``.

    It multiplies what the optimizer was made with (``initial_lr`` of its groups), for each group by the same ratio:
    from ``warmup_min_ratio`` up to 1, and down to ``cos_min_ratio``, where it stays. The first optimizer step has
    ratio 0, whatever ``warmup_min_ratio`` is: that comes with the second.

    Args:
        optimizer: Whose learning rates are set.
        total_num_steps: Optimizer steps of the whole training. If there are fewer than ``warmup_num_steps``, which is
            warned of, the rate falls at once after the warm-up.
        warmup_min_ratio: At which ratio the warm-up begins.
        warmup_num_steps: Optimizer steps of the warm-up; 2 if it is 1.
        cos_min_ratio: At which ratio the cosine ends.
        warmup_type: "log" grows quickly at first, "linear" evenly.
        last_batch_iteration: See ``Schedule``.

    Raises:
        ValueError: If a setting is out of range.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        require_number("warmup_min_ratio", warmup_min_ratio)
        require_number("cos_min_ratio", cos_min_ratio)
        self.total_num_steps = _total_steps(total_num_steps, warmup_num_steps)
        self.warmup_min_ratio = warmup_min_ratio
        self.warmup_num_steps = _warmup_steps(warmup_num_steps, warmup_type)
        self.cos_min_ratio = cos_min_ratio
        self.warmup_type = warmup_type
        super().__init__(optimizer, last_batch_iteration)

    @override
    def rates(self, done: int) -> list[float | Tensor]:
        ratio = self._ratio(done - 1) if done else 0.0
        return [base * ratio for base in self.base_lrs]

    def _ratio(self, iteration: int) -> float:
        if iteration < self.warmup_num_steps:
            low, way = self.warmup_min_ratio, _grown(iteration, self.warmup_num_steps, self.warmup_type)
        else:
            fallen = (iteration - self.warmup_num_steps + 1) / max(1, self.total_num_steps - self.warmup_num_steps)
            low, way = self.cos_min_ratio, (1 + math.cos(math.pi * min(1.0, fallen))) / 2
        return low + (1 - low) * way


def _grown(iteration: int, steps: int, kind: str) -> float:
    """How much of the warm-up is done."""
    return math.log(iteration + 1) / math.log(steps) if kind == "log" else iteration / steps


def _warmup_steps(steps: int, kind: str) -> int:
    require_number("warmup_num_steps", steps, 1, whole=True)
    if kind not in ("log", "linear"):
        raise ValueError(f"Expected warmup_type to be 'log' or 'linear', got {kind!r}.")
    return max(2, steps)


def _total_steps(total: int, warmup: int) -> int:
    require_number("total_num_steps", total, 1)
    require_number("warmup_num_steps", warmup, 1, whole=True)
    if total < max(2, warmup):
        warnings.warn(
            f"total_num_steps={total} is less than warmup_num_steps={max(2, warmup)}: the learning rate falls at once"
            " after the warm-up.",
            stacklevel=3,
        )
    return total
