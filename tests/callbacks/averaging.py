"""How the tests of this folder train: with a buffer, validation within epochs, accumulation and clipping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from models import FLOAT64, ROWS, Regression, alone, assert_close, loader, trainer, values
from torch import Tensor, nn

from lightning_accel import callbacks as our_callbacks
from lightning_accel.strategies import AccelFSDPStrategy

EPOCHS = 12  # of 4 batches and 2 optimizer steps
# Where a run can be stopped and where it can go on; "auto" is Lightning's own callback on one device.
CONTINUATIONS = [*[(row, "auto") for row in ROWS], *[("auto", row) for row in ROWS], ("zero1", "fsdp"), ("fsdp", "ddp")]


class Counting(Regression):
    """With a buffer that training changes in the same way on every rank, and a part that is not trained."""

    def __init__(self, *, norm: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.still = nn.Linear(2, 2).double().requires_grad_(False)
        with torch.no_grad():
            self.still.weight.fill_(1)
            self.still.bias.fill_(2)
        if norm:
            self.net.last = nn.Sequential(nn.BatchNorm1d(5), self.net.last).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        return super().training_step(batch, batch_idx) * self.still.weight.mean()


class Recording(pl.Callback):
    """Notes learning rates and what validation found, saves at the end of each epoch, and may stop early."""

    def __init__(self, path: Path | None = None, stop_after: int | None = None) -> None:
        self.path = path
        self.stop_after = stop_after
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.losses.append(trainer.callback_metrics["val_loss"].item())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.path is not None:
            trainer.save_checkpoint(self.path)
        if trainer.current_epoch + 1 == self.stop_after:
            trainer.should_stop = True


def library(strategy: str) -> Any:
    """The callbacks for a strategy."""
    return lightning_callbacks if strategy == "auto" else our_callbacks


def make(strategy: str, **arguments: Any) -> pl.Trainer:
    """A Trainer for a row in a rank, or for "auto" in pytest's process; "hybrid" is two copies on four ranks."""
    if strategy == "hybrid":
        return trainer(AccelFSDPStrategy(sharding="hybrid", shard_size=2), devices=4, **arguments)
    return alone(**arguments) if strategy == "auto" else trainer(f"accel_{strategy}", **arguments)


def everything(module: pl.LightningModule) -> dict[str, Tensor]:
    """Copies of whole parameters and of buffers."""
    return {**values(module), **{name: buffer.double().clone() for name, buffer in module.named_buffers()}}


def fit(
    strategy: str,
    average: Callable[[str], pl.Callback],
    *,
    save: Path | None = None,
    ckpt_path: Path | None = None,
    stop_after: int | None = None,
    **arguments: Any,
) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Train; final values, validation losses and learning rates.

    Args:
        strategy: A row, or "auto".
        average: Makes the callback for a strategy.
        save: Where to save at the end of each epoch.
        ckpt_path: Where to go on from.
        stop_after: Epochs to stop after, though the callback expects more: its schedule may depend on how many.
        arguments: For the Trainer.
    """
    module = Counting()
    recording = Recording(save, stop_after)
    settings = {
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.3,
        "num_sanity_val_steps": 1,
        "callbacks": [average(strategy), recording],
        **arguments,
    }
    make(strategy, **settings).fit(module, loader(), loader(size=16), ckpt_path=ckpt_path)
    return everything(module), recording.losses, recording.rates


def assert_same(actual: Any, expected: Any, tolerance: float = FLOAT64) -> None:
    """Compare two results of `fit`; of what was recorded, what they have both."""
    assert_close(actual[0], expected[0], tolerance)
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        length = min(len(ours), len(theirs))
        assert length > 0
        for a, b in zip(ours[-length:], theirs[-length:], strict=True):
            assert abs(a - b) <= tolerance * abs(b), (ours, theirs)
