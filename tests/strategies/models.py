"""A tiny model, its data, and how the tests of this folder train it.

Everything is float64 by default, so that what differs from a single process by more than rounding is a bug.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_accel.core import Engine
from lightning_accel.core.collectives import Pending, Published
from lightning_accel.core.layout import Layout
from lightning_accel.core.registry import engines_of

if TYPE_CHECKING:  # a script that uses this file has no path to the harness
    from harness import Ranks

REPLICATED = ["ddp", "zero1", "zero2"]
"""Rows that have all parameters on every rank at all times: what reads or changes them between steps works there."""
ROWS = [*REPLICATED, "fsdp", "fsdp_partial"]
# Where a run can be stopped and where it can go on; "auto" is stock Lightning on one device.
CONTINUATIONS = [*[(row, row) for row in ROWS], ("zero2", "ddp"), ("ddp", "zero1")]
CONTINUATIONS += [*[(row, "auto") for row in ROWS], *[("auto", row) for row in ROWS]]
FEATURES, OUTPUTS = 5, 3

# float64 carries 53 bits: 1.1e-16 an operation. Some tens of steps, whose sums are taken in another order than in a
# single process, leave a few thousand times that at most; a wrong factor or a lost gradient is larger by far.
FLOAT64 = 1e-12


class Samples(Dataset[tuple[int, Tensor, Tensor]]):
    """Sample `index` is the same in every process: (index, features, targets)."""

    def __init__(self, size: int = 32, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(size, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randn(size, OUTPUTS, generator=generator, dtype=torch.float64).to(dtype)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        return index, self.x[index], self.y[index]


def loader(*, size: int = 32, dtype: torch.dtype = torch.float64) -> DataLoader:
    """Batches that are 8 samples over all ranks, in order: rank r takes samples r, r + ranks, ... of each 8.

    The sampler is given, because Lightning's own for training always shuffles.
    """
    data = Samples(size, dtype)
    if not dist.is_initialized():
        return DataLoader(data, batch_size=8)
    ranks = dist.get_world_size()
    return DataLoader(data, batch_size=8 // ranks, sampler=DistributedSampler(data, shuffle=False))


class Data(pl.LightningDataModule):
    """Makes the loader in each rank, when the ranks are there."""

    def train_dataloader(self) -> DataLoader:
        return loader()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """138 parameters; no size divides evenly, so that parts of ranks end within parameters and there is padding."""

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 5)
        self.blocks = nn.ModuleList(Block(5) for _ in range(3))
        self.last = nn.Linear(5, OUTPUTS)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(FEATURES))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Regression(pl.LightningModule):
    """Net on Samples, with Adam and a learning rate that changes every step."""

    def __init__(self, *, lr: float = 0.02, seed: int = 0, optimizer: str = "AdamW", fused: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        _, x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[1])

    def configure_optimizers(self) -> Any:
        kind = getattr(torch.optim, self.hparams["optimizer"])
        arguments = {"fused": True} if self.hparams["fused"] else {}
        optimizer = kind(self.parameters(), lr=self.hparams["lr"], **arguments)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class MeanOfShortWindows(pl.Callback):
    """Has Lightning's own strategies take the mean over the batches of an epoch's last window, as ours do."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches
        for group in optimizer.param_groups if batches else []:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(trainer.accumulate_grad_batches / batches)


def trainer(strategy: Any, devices: int = 2, **arguments: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    if strategy in ("auto", "ddp"):
        arguments["callbacks"] = [*(arguments.get("callbacks") or []), MeanOfShortWindows()]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return pl.Trainer(accelerator="cpu", strategy=strategy, devices=devices, **{**quiet, **arguments})


def alone(**arguments: Any) -> pl.Trainer:
    """Stock Lightning on one device, for the process that pytest runs in: what all strategies must equal."""
    return trainer("auto", devices=1, **arguments)


def make(strategy: str, **arguments: Any) -> pl.Trainer:
    """A Trainer for a row in a rank, or for "auto" in pytest's process."""
    return alone(**arguments) if strategy == "auto" else trainer(f"accel_{strategy}", **arguments)


def on(strategy: str, ranks: Ranks, function: Callable[..., Any], *arguments: Any, **more: Any) -> list[Any]:
    """Call in pytest's process for "auto", on all ranks for a row."""
    if strategy == "auto":
        return [function(*arguments, **more)]
    return ranks.run(function, *arguments, **more)


def arrive_late(engine: Engine) -> None:
    """Have gathered parameters be NaN until they are waited for: the slowest network there is."""
    all_gather = engine.collectives.all_gather

    def gather_when_waited_for(buffer: Tensor, layout: Layout) -> Pending:
        start, stop = layout.part(engine.collectives.rank)
        with torch.no_grad():
            buffer[:start].fill_(math.nan)
            buffer[stop:].fill_(math.nan)
        return Pending([], lambda: all_gather(buffer, layout).wait())

    engine.collectives.all_gather = gather_when_waited_for  # type: ignore[method-assign]
    fetch = engine.collectives.fetch

    def fetch_when_waited_for(source: Published, layout: Layout, buffer: Tensor) -> Pending:
        with torch.no_grad():
            buffer.fill_(math.nan)
        return Pending([], lambda: fetch(source, layout, buffer).wait())

    engine.collectives.fetch = fetch_when_waited_for  # type: ignore[method-assign]


class ArriveLate(pl.Callback):
    """`arrive_late` for a Trainer."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = getattr(trainer.strategy, "engine", None)
        if engine is not None:
            arrive_late(engine)


class SaveAtEnd(pl.Callback):
    """Saves to one file, over what is there, at the end of each epoch."""

    def __init__(self, path: Path | str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def values(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters; of whole ones, where they rest sharded and all ranks call this."""
    with ExitStack() as stack:
        for engine in engines_of(module):
            stack.enter_context(engine.full_parameters())
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def fit(strategy: str, ckpt_path: Any = None, **arguments: Any) -> dict[str, Tensor]:
    """The whole parameters after Regression was trained on the loader's batches."""
    module = Regression()
    make(strategy, **arguments).fit(module, loader(), ckpt_path=ckpt_path)
    return values(module)


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = FLOAT64) -> None:
    """Each tensor's error, relative in norm."""
    assert actual.keys() == expected.keys()
    errors = {
        name: ((actual[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-30)).item()
        for name in expected
    }
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"expected relative errors up to {tolerance}, got {wrong}"
