"""Ever larger learning rates, to find the largest that a model can be trained with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.schedules.schedule import Schedule, by_group, require_number


class LRRangeTest(Schedule):
    """A learning rate that grows in equal steps, as DeepSpeed's ``LRRangeTest``.

    After n optimizer steps it is ``min_lr * (1 + step_rate * n / step_size)``, with the quotient rounded down for a
    staircase. Where the loss stops falling is about the largest learning rate; see "A disciplined approach to neural
    network hyper-parameters: Part 1" (Smith, 2018).

    Args:
        optimizer: Whose learning rates are set. Those that it was made with do not count.
        lr_range_test_min_lr: The first learning rate, for all parameter groups or for each.
        lr_range_test_step_size: Optimizer steps until it has grown by ``lr_range_test_step_rate`` of the first one.
        lr_range_test_step_rate: How much it grows in that time, in first learning rates.
        lr_range_test_staircase: Grow at once when that many steps are done, not a bit in each.
        last_batch_iteration: See ``Schedule``.

    Raises:
        ValueError: If a setting is out of range.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = by_group(optimizer, "lr_range_test_min_lr", lr_range_test_min_lr)
        require_number("lr_range_test_step_size", lr_range_test_step_size, 1, whole=True)
        require_number("lr_range_test_step_rate", lr_range_test_step_rate)
        self.step_size = lr_range_test_step_size
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    @override
    def rates(self, done: int) -> list[float | Tensor]:
        intervals = done // self.step_size if self.staircase else done / self.step_size
        return [low * (1 + self.step_rate * intervals) for low in self.min_lrs]
