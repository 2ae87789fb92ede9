"""One cycle of the learning rate up and down, the momentum down and up, and a decay."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.schedules.schedule import Schedule, by_group, require_number

_SECOND_BETA = 0.99
"""What DeepSpeed sets the second of ``betas`` to whenever it sets the first."""


class OneCycle(Schedule):
    """The learning rate goes up, down again, and then decays, as DeepSpeed's ``OneCycle``.

    Both halves of the cycle are straight lines between ``cycle_min_lr`` and ``cycle_max_lr``. n optimizer steps after
    the cycle the rate is ``cycle_min_lr / (1 + decay_lr_rate * n / decay_step_size)``. See "A disciplined approach to
    neural network hyper-parameters: Part 1" (Smith, 2018).

    With ``cycle_momentum`` the first of an optimizer's ``betas`` goes the other way, from ``cycle_max_mom`` to
    ``cycle_min_mom`` and back, and is ``cycle_max_mom * (1 + decay_mom_rate * n / decay_step_size)`` after the cycle.
    As with DeepSpeed, the second is 0.99 then, whatever the optimizer was made with; the first optimizer step has
    ``cycle_min_mom``; and the ``momentum`` of SGD stays as it is.

    Args:
        optimizer: Whose learning rates and momenta are set. Those that it was made with do not count.
        cycle_min_lr: The learning rate at both ends of the cycle, for all parameter groups or for each.
        cycle_max_lr: In its middle, likewise.
        decay_lr_rate: By how much of itself the rate's divisor grows in ``decay_step_size`` steps. 0: no decay.
        cycle_first_step_size: Optimizer steps of the first half.
        cycle_second_step_size: Of the second half. None: as many.
        cycle_first_stair_count: Go up in so many stairs. 0: a bit in each step.
        cycle_second_stair_count: Go down in so many. None: as many.
        decay_step_size: Optimizer steps by which ``decay_lr_rate`` and ``decay_mom_rate`` are meant. 0: no decay.
        cycle_momentum: Set momenta as well.
        cycle_min_mom: The momentum in the middle of the cycle, for all parameter groups or for each; below 1.
        cycle_max_mom: At both ends, likewise.
        decay_mom_rate: By how much of itself the momentum grows in ``decay_step_size`` steps, less if negative.
        last_batch_iteration: See ``Schedule``.

    Raises:
        ValueError: If a setting is out of range; in ``step``, if ``decay_mom_rate`` has brought a momentum to 1, with
            which no optimizer works, or below 0.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: float | Sequence[float],
        cycle_max_lr: float | Sequence[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float | Sequence[float] = 0.8,
        cycle_max_mom: float | Sequence[float] = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = by_group(optimizer, "cycle_min_lr", cycle_min_lr)
        self.max_lrs = by_group(optimizer, "cycle_max_lr", cycle_max_lr)
        self.min_moms = by_group(optimizer, "cycle_min_mom", cycle_min_mom)
        self.max_moms = by_group(optimizer, "cycle_max_mom", cycle_max_mom)
        for name, momenta in (("cycle_min_mom", self.min_moms), ("cycle_max_mom", self.max_moms)):
            if max(momenta) >= 1:
                raise ValueError(f"Expected {name} to be below 1, got {max(momenta)!r}.")
        require_number("cycle_first_step_size", cycle_first_step_size)
        if cycle_first_step_size == 0:
            raise ValueError("Expected cycle_first_step_size to be above 0, got 0.")
        self.first_steps = cycle_first_step_size
        self.second_steps = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        require_number("cycle_second_step_size", self.second_steps)
        self.first_stairs = cycle_first_stair_count
        self.second_stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        require_number("cycle_first_stair_count", self.first_stairs, whole=True)
        require_number("cycle_second_stair_count", self.second_stairs, whole=True)
        require_number("decay_step_size", decay_step_size)
        require_number("decay_lr_rate", decay_lr_rate)
        require_number("decay_mom_rate", decay_mom_rate, signed=True)
        self.decay_step_size = decay_step_size
        self.decay_lr_rate = decay_lr_rate
        self.decay_mom_rate = decay_mom_rate
        self.cycle_momentum = cycle_momentum
        if cycle_momentum and "betas" not in optimizer.defaults:
            warnings.warn(
                f"{type(optimizer).__name__} has no betas, so OneCycle leaves its momentum alone."
                " cycle_momentum=False says so.",
                stacklevel=2,
            )
            self.cycle_momentum = False
        super().__init__(optimizer, last_batch_iteration)

    @override
    def rates(self, done: int) -> list[float | Tensor]:
        if self._is_over(done):
            return [low / (1 + self.decay_lr_rate * self._decays(done)) for low in self.min_lrs]
        height = self._height(done)
        return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def momenta(self, done: int) -> list[float]:
        """The momentum of each parameter group after so many optimizer steps.

        Args:
            done: The number of optimizer steps, at least 0.

        """
        if done == 0:
            return self.min_moms
        if self._is_over(done):
            return [high * (1 + self.decay_mom_rate * self._decays(done)) for high in self.max_moms]
        height = self._height(done)
        return [high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms, strict=True)]

    @override
    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group for the next optimizer step.

        Within ``step``, sets the momenta, too: as in torch's schedulers, this is what all ways to take a step call.
        """
        if self.cycle_momentum and self._get_lr_called_within_step:
            momenta = self.momenta(self.last_epoch)
            if not all(0 <= momentum < 1 for momentum in momenta):
                raise ValueError(
                    f"Expected momenta of at least 0 and below 1, got {momenta} after {self.last_epoch} steps:"
                    f" decay_mom_rate={self.decay_mom_rate:g} changes them too much. Use a smaller one, or 0."
                )
            for group, momentum in zip(self.optimizer.param_groups, momenta, strict=True):
                group["betas"] = (momentum, _SECOND_BETA)
        return super().get_lr()

    def _is_over(self, done: int) -> bool:
        # A cycle of 10.5 steps has 12 values, as with DeepSpeed.
        return done - 1 >= self.first_steps + self.second_steps

    def _decays(self, done: int) -> float:
        """How many times ``decay_step_size`` has gone by since the cycle."""
        if not self.decay_step_size:
            return 0.0
        return (done - self.first_steps - self.second_steps) / self.decay_step_size

    def _height(self, done: int) -> float:
        """How far the cycle is from its ends, from 0 to 1."""
        total = self.first_steps + self.second_steps
        position = done % total
        if position <= self.first_steps:
            way, steps, stairs = position, self.first_steps, self.first_stairs
        else:
            way, steps, stairs = total - position, self.second_steps, self.second_stairs
        # In this order: (way / steps) * stairs might be a little less than the stair that was reached.
        return math.floor(way * stairs / steps) / stairs if stairs else way / steps
