"""Where in an epoch a checkpoint was made, as Lightning's loops tell it, and how they are made to go on from there.

[Note: Lightning's restarts]
Lightning 2.6 has a case for each hook that a checkpoint may be saved in, and some of them do not do what the run would
have done: the validation that is due after a batch is skipped, and so is the end of an epoch after its last batch; with
``max_steps`` an epoch that was over gets another batch; one saved as it begins is skipped. Here the loops' counters are
written anew, so that each checkpoint is one of two cases that Lightning handles well: an epoch that is about to begin,
or one in which so many batches are over and nothing else is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

_EPOCHS = "epoch_progress"
_BATCHES = "epoch_loop.batch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"


@dataclass(frozen=True, kw_only=True)
class Position:
    """What of a fit is done."""

    epoch: int
    """The epoch, as samplers know it."""
    begins: bool = False
    """Whether it is about to begin."""
    batches: int = 0
    """How many of its batches are over, by Lightning's count on each rank."""
    is_last: bool = False
    """Whether there are no more."""
    is_within_batch: bool = False
    """Whether the next batch has begun: what it did to random numbers cannot be undone."""
    is_validated: bool = True
    """Whether a validation that is due after these batches is over."""
    is_counted: bool = True
    """Whether Lightning has counted the last batch for loggers."""
    is_closed: bool = True
    """Whether the epoch before is over, and not just its hooks: schedulers that follow a metric come after these."""

    @classmethod
    def of(cls, loops: Mapping[str, Any], *, validating: bool = False) -> Position:
        """Read the state of a fit loop.

        Args:
            loops: ``checkpoint["loops"]["fit_loop"]``.
            validating: Whether it was taken within validation.

        """
        epochs, batches, validation = loops[_EPOCHS]["current"], loops[_BATCHES], loops[_VALIDATION]
        now = batches["current"]
        done = now["processed"]  # counted before ``on_train_batch_end``, and "completed" after it
        has_begun = epochs["started"] > epochs["processed"]
        # Stopped by max_steps, max_time or a callback in the middle of an epoch, which Lightning counts as a whole one.
        was_cut = not has_begun and done > 0 and epochs["processed"] > 0 and not batches["is_last_batch"]
        if not has_begun and not was_cut:
            return cls(epoch=epochs["processed"], begins=True, is_closed=epochs["completed"] == epochs["processed"])
        seen = validation["current"]
        at_batch_end = now["completed"] < done
        is_validated = validation["is_last_batch"] and seen["completed"] == seen["ready"] > 0
        return cls(
            epoch=epochs["processed"] - was_cut,
            batches=done,
            is_last=batches["is_last_batch"] and done > 0,
            is_within_batch=now["ready"] > done,
            is_validated=is_validated if validating else not at_batch_end,
            is_counted=not validating and not at_batch_end,
        )

    def write(self, loops: dict[str, Any]) -> None:
        """Have a fit loop that loads this state go on from here. See [Note: Lightning's restarts].

        Args:
            loops: ``checkpoint["loops"]["fit_loop"]``; changed in place.

        """
        epochs, batches, validation = loops[_EPOCHS], loops[_BATCHES], loops[_VALIDATION]
        _set(epochs["current"], self.epoch, begun=not self.begins)
        past = epochs["total"]["started"] - (not self.begins)
        _set(epochs["total"], past, begun=not self.begins)
        repeated = 0 if self.begins else batches["current"]["processed"] - self.batches
        _set(batches["total"], batches["total"]["processed"] - repeated)
        _set(batches["current"], self.batches)
        batches["is_last_batch"] = self.is_last
        _set(validation["total"], validation["total"]["completed"])
        _set(validation["current"], 0)
        validation["is_last_batch"] = False


def begin_epoch(trainer: pl.Trainer, position: Position) -> None:
    """Have a fit that resumed where an epoch begins do so as after another epoch. Call as training starts.

    Args:
        trainer: The Trainer, whose loops were loaded from what ``position`` has written.
        position: One that begins.

    """
    fit = trainer.fit_loop
    fit._restarting = fit._resuming_from_checkpoint = False
    fit.epoch_loop.restarting = False
    if not position.is_closed:
        fit.epoch_progress.current.completed -= 1  # which says what epoch is over
        fit.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        fit.epoch_progress.current.completed += 1


def _set(counter: dict[str, int], done: int, *, begun: bool = False) -> None:
    counter.update(ready=done + begun, started=done + begun, processed=done, completed=done)
