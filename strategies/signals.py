"""Signals that end a run or have it requeued: all ranks act on them together, between two optimizer steps.

[Note: signals]
Lightning acts where a signal happens to arrive: on SLURM's requeue signal every rank saves at once, in the middle of
whatever it is doing, and on SIGTERM it sends a message from within the handler, which other ranks may take for one of
training. To save what rests sharded, all ranks must come together. So handlers only take note here; the ranks compare
notes where Lightning compares them anyway, once a batch, and act when gradients are not half accumulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException


class AgreedSignals:
    """Has a Trainer act on signals at the same batch on all ranks, until ``remove``.

    Args:
        trainer: The Trainer, before it has registered its handlers.
        device: Where messages to other ranks are sent from.

    """

    def __init__(self, trainer: pl.Trainer, device: torch.device) -> None:
        self._trainer = trainer
        self._device = device
        self._connector = trainer._signal_connector
        self._requeue: Callable[[Any, Any], None] = self._connector._slurm_sigusr_handler_fn
        self._terminated = False
        self._requeued: int | None = None
        replaced = {"_sigterm_notifier_fn": self._note_termination, "_slurm_sigusr_handler_fn": self._note_requeue}
        for name, method in replaced.items():
            setattr(self._connector, name, method)
        self._loop = trainer.fit_loop.epoch_loop
        self._loop._broadcast_sigterm_tensor = self.act  # type: ignore[method-assign]

    @property
    def batches_before_this(self) -> int:
        """How many batches of the epoch were begun before the one that is under way."""
        return self._loop.batch_progress.current.ready - 1

    def remove(self) -> None:
        """Have everything as it was."""
        for owner, name in (
            (self._connector, "_sigterm_notifier_fn"),
            (self._connector, "_slurm_sigusr_handler_fn"),
            (self._loop, "_broadcast_sigterm_tensor"),
        ):
            vars(owner).pop(name, None)

    def _note_termination(self, signum: int, _: Any) -> None:
        launcher = self._trainer.strategy.launcher
        if not self._terminated and launcher is not None:
            launcher.kill(signum)  # the children are to know, too
        self._terminated = True

    def _note_requeue(self, signum: int, _: Any) -> None:
        self._requeued = signum

    def act(self, batches: int | None = None) -> None:
        """Do what the signals ask for that any rank has got. All ranks call this before each batch.

        Args:
            batches: How many there were in this epoch; by default as many as Lightning has begun.

        Raises:
            SIGTERMException: On all of them, if any was told to end.

        """
        if batches is None:
            batches = self._loop.batch_progress.current.ready
        if batches % self._trainer.accumulate_grad_batches:
            return  # what was accumulated would be lost
        terminated, requeued = self._terminated, self._requeued or 0
        if self._trainer.world_size > 1:
            notes = torch.tensor([int(terminated), requeued], device=self._device)
            dist.all_reduce(notes, op=dist.ReduceOp.MAX)
            terminated, requeued = bool(notes[0]), int(notes[1])
        if requeued:
            self._requeued = None
            self._requeue(requeued, None)
        if terminated:
            self._connector.received_sigterm = True
            raise SIGTERMException
