"""Learning rate schedulers as ``Accelerator.prepare`` returns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from lightning_accel.manual.accumulation import Accumulation
from lightning_accel.manual.optimizer import PreparedOptimizer


class PreparedScheduler:
    """Steps when its optimizer really has stepped, as often as there are batches of one process in that step.

    Args:
        scheduler: The user's.
        optimizers: Those whose steps it follows.
        accumulation: Where the loop is.
        times: How many steps of the schedule one optimizer step is: with batches that the ranks have besides each
            other, as many as there are ranks, so that a schedule written for one process spans the same samples.
        with_optimizer: Whether it follows the optimizer at all. If not, every call is one step.

    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: Sequence[PreparedOptimizer],
        accumulation: Accumulation,
        *,
        times: int,
        with_optimizer: bool,
    ) -> None:
        self.scheduler = scheduler
        self.optimizers = list(optimizers)
        self._accumulation = accumulation
        self._times = times
        self._with_optimizer = with_optimizer

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Call after ``optimizer.step()``, for every micro-batch.

        Nothing happens while gradients accumulate, in a window in which the optimizer was not stepped, and when the
        scaler has skipped the optimizer's step. A schedule that has an end (``total_steps``) stays there: the ranks'
        last batches may be more than there are samples. ``ReduceLROnPlateau`` is told a metric, which counts once, on
        any number of ranks.
        """
        if isinstance(self.scheduler, ReduceLROnPlateau) or not self._with_optimizer:
            self.scheduler.step(*args, **kwargs)
            return
        if not self._accumulation.sync_gradients:
            return
        if not any(o.has_stepped for o in self.optimizers) or any(o.step_was_skipped for o in self.optimizers):
            return
        for _ in range(self._times):
            end = getattr(self.scheduler, "total_steps", None)
            if end is not None and isinstance(self.scheduler, OneCycleLR):
                end -= 1  # where its lowest rate is: torch allows one more step, which may lead to a negative one
            if end is None or self.scheduler.last_epoch < end:
                self.scheduler.step(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The user's scheduler's."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the user's scheduler."""
        self.scheduler.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not there yet, as while it is unpickled
            raise AttributeError(name)
        return getattr(self.scheduler, name)
