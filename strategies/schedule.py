"""Learning rates that stay where they are when the optimizer's step was skipped."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl


def hold_schedules(trainer: pl.Trainer, was_skipped: Callable[[], bool]) -> Callable[[], object]:
    """Leave out the updates of a Trainer's per-step LR schedulers that follow a skipped optimizer step.

    Under automatic optimization, where Lightning updates them itself. Those per epoch go on.

    Args:
        trainer: The Trainer, in its set-up.
        was_skipped: Says whether the last optimizer step was skipped.

    Returns:
        What takes that back.

    """
    loop = trainer.fit_loop.epoch_loop
    update = type(loop).update_lr_schedulers

    def update_unless_skipped(interval: str, update_plateau_schedulers: bool) -> None:
        if interval != "step" or not was_skipped():
            update(loop, interval, update_plateau_schedulers)

    loop.update_lr_schedulers = update_unless_skipped  # type: ignore[method-assign]
    return lambda: vars(loop).pop("update_lr_schedulers", None)
