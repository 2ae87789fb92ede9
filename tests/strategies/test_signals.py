"""Signals: all ranks act on them at the same batch, whichever of them got one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from models import Regression, alone, assert_close, fit, loader, make, values

from harness import Ranks
from lightning_accel.core.checkpoint import load
from lightning_accel.strategies.stock import whole
from rows import everyday


class Signal(pl.Callback):
    """One rank gets a signal within the third batch."""

    def __init__(self, rank: int, number: int) -> None:
        self.rank, self.number = rank, number

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.fit_loop.batch_idx == 2:
            os.kill(os.getpid(), self.number)


def terminated(row: str, rank: int, folder: Path, accumulate: int) -> int:
    callbacks = [Signal(rank, signal.SIGTERM), OnExceptionCheckpoint(folder, filename="stopped")]
    arguments = {"accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    used = make(row, max_epochs=2, callbacks=callbacks, **arguments)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        used.fit(Regression(), loader())
    assert signal.getsignal(signal.SIGTERM) is before
    return used.global_step


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_sigterm_on_one_rank_ends_all_after_the_step_and_saves_once(
    ranks2: Ranks, row: str, rank: int, tmp_path: Path
) -> None:
    # The third batch of four is the first of a window of two: its gradients must not be lost.
    steps = ranks2.run(terminated, row, rank, tmp_path, 2)
    assert steps == [2, 2]
    module = Regression()
    alone(max_epochs=2, accumulate_grad_batches=2).fit(module, loader(), ckpt_path=tmp_path / "stopped.ckpt")
    assert_close(values(module), fit("auto", max_epochs=2, accumulate_grad_batches=2))


def test_sigterm_of_a_process_alone(tmp_path: Path) -> None:
    assert terminated_alone(tmp_path) == 3
    assert whole(load(tmp_path / "stopped.ckpt"))["global_step"] == 3


def terminated_alone(folder: Path) -> int:
    from models import trainer

    callbacks = [Signal(0, signal.SIGTERM), OnExceptionCheckpoint(folder, filename="stopped")]
    used = trainer("accel_zero2", devices=1, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(SIGTERMException):
        used.fit(Regression(), loader())
    return used.global_step


def requeued(row: str, folder: Path) -> list[int]:
    saved: list[int] = []

    def save(connector: _SignalConnector, *_: Any) -> None:
        saved.append(connector.trainer.global_step)
        connector.trainer.save_checkpoint(folder / "hpc_ckpt_1.ckpt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_SignalConnector, "_slurm_sigusr_handler_fn", save)
        used = make(row, callbacks=[Note(rank=1)])
        used.fit(Regression(), loader())
    return saved


class Note(Signal):
    """As if SLURM had sent its signal: handlers for it are there on SLURM only."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, signal.SIGUSR1)

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.fit_loop.batch_idx == 1:
            trainer._signal_connector._slurm_sigusr_handler_fn(self.number, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_a_requeue_signal_on_one_rank_has_all_save_once(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    assert ranks2.run(requeued, row, tmp_path) == [[2], [2]]
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
