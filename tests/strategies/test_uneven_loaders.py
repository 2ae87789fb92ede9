"""Ranks with different numbers of training batches, under the Trainer and Fabric: an error, or joined."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from core.toys import EXACT, adamw, relative_error
from harness import Ranks
from lightning_accel import engine_of
from lightning_accel.data import joined
from rows import everyday

SOON_S = 30
ROWS = ["ddp", "zero1", "zero2", "fsdp", "fsdp_partial"]


def batches_of(rank: int, counts: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(20 + rank)
    return [torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(counts[rank])]


def new_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


class Lit(pl.LightningModule):
    def __init__(self, counts: list[int], joins: bool) -> None:
        super().__init__()
        self.net = new_net()
        self.counts, self.joins = counts, joins
        self.shadows: list[bool] = []

    def train_dataloader(self) -> Any:
        loader: DataLoader[Any] = DataLoader(batches_of(dist.get_rank(), self.counts), batch_size=None)  # type: ignore[arg-type]
        self.loop = joined(loader) if self.joins else loader
        return self.loop

    def training_step(self, x: Tensor, _: int) -> Tensor:
        self.shadows.append(getattr(self.loop, "is_shadow", False))
        return self.net(x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.parameters())


def alone(counts: list[int], epochs: int) -> nn.Module:
    """A single process: each step's loss is the mean over the ranks that still have a batch."""
    net = new_net()
    optimizer = adamw(net.parameters())
    everyone = [batches_of(rank, counts) for rank in range(len(counts))]
    for _ in range(epochs):
        for step in range(max(counts)):
            losses = [net(batches[step]).square().mean() for batches in everyone if step < len(batches)]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
    return net


def fitted(row: str, counts: list[int], joins: bool, **options: Any) -> tuple[float, list[bool]]:
    trainer = pl.Trainer(
        strategy=f"accel_{row}",
        accelerator="cpu",
        devices=2,
        max_epochs=2,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    lit = Lit(counts, joins)
    trainer.fit(lit)
    return relative_error(lit.net.parameters(), alone(counts, 2).parameters()), lit.shadows


@pytest.mark.parametrize("row", everyday(ROWS))
def test_a_fit_with_joined_loaders(ranks2: Ranks, row: str) -> None:
    (first, shadows), (second, others) = ranks2.run(fitted, row, [2, 3], True)
    assert max(first, second) < EXACT
    assert shadows == [False, False, True] * 2
    assert others == [False] * 6


@pytest.mark.parametrize("row", everyday(ROWS))
def test_a_fit_with_uneven_loaders_is_an_error_at_once(ranks2: Ranks, row: str) -> None:
    begin = time.monotonic()
    for error in ranks2.run_expecting_error(fitted, row, [2, 3], False):
        assert error is not None
        assert "Expected as many training batches on every rank, got [2, 3] by rank" in error[1]
        assert "joined(loader)" in error[1]
    assert time.monotonic() - begin < SOON_S


def test_uneven_loaders_that_are_limited_to_what_all_have(ranks2: Ranks) -> None:
    for _, shadows in ranks2.run(fitted, "zero2", [2, 3], False, limit_train_batches=2):
        assert shadows == [False] * 4
    for _, shadows in ranks2.run(fitted, "zero2", [2, 3], False, max_steps=2):
        assert shadows == [False] * 2


class Shuffled(Lit):
    def train_dataloader(self) -> Any:
        samples = torch.cat(batches_of(dist.get_rank(), self.counts))
        self.loop = joined(DataLoader(samples, batch_size=2, shuffle=True))  # type: ignore[arg-type]
        return self.loop


def fitted_in_two(row: str, counts: list[int], path: Path | None, steps: int) -> tuple[list[Tensor], list[bool]]:
    """Fit so many steps, or go on from where such a fit has ended, and save."""
    options: dict[str, Any] = {"strategy": f"accel_{row}", "accelerator": "cpu", "devices": 2, "max_epochs": 2}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**options, **quiet, max_steps=steps, use_distributed_sampler=False, enable_checkpointing=False)
    lit = Shuffled(counts, True)
    pl.seed_everything(dist.get_rank() if path is None or not path.exists() else 9, verbose=False)
    trainer.fit(lit, ckpt_path=path if path is not None and path.exists() else None)
    if path is not None:
        trainer.save_checkpoint(path)
    return [parameter.detach().clone() for parameter in lit.net.parameters()], lit.shadows


@pytest.mark.parametrize("steps", [*(pytest.param(n, marks=pytest.mark.matrix) for n in (2, 9)), 4, 7])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_a_fit_goes_on_within_joined_loaders(ranks2: Ranks, row: str, steps: int, tmp_path: Path) -> None:
    whole = ranks2.run(fitted_in_two, row, [3, 5], None, 10)
    first = ranks2.run(fitted_in_two, row, [3, 5], tmp_path / "saved.ckpt", steps)
    rest = ranks2.run(fitted_in_two, row, [3, 5], tmp_path / "saved.ckpt", 10)
    for (expected, shadows), (_, before), (found, after) in zip(whole, first, rest, strict=True):
        assert before + after == shadows
        assert len(before) == steps
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Endless:
    def __iter__(self) -> Any:
        return iter(batches_of(0, [2]))


class WithoutLength(Lit):
    def train_dataloader(self) -> Any:
        return joined(Endless())


def fitted_without_length() -> None:
    trainer = pl.Trainer(strategy="accel_zero2", accelerator="cpu", devices=2, max_epochs=1, logger=False)
    trainer.fit(WithoutLength([2, 2], True))


def test_a_joined_loader_without_a_length(ranks2: Ranks) -> None:
    for error in ranks2.run_expecting_error(fitted_without_length):
        assert error is not None
        assert "Expected what a Trainer goes through as a joined loader to have a length" in error[1]


def looped(row: str, counts: list[int]) -> float:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=f"accel_{row}")
    fabric.launch()
    net = new_net()
    model, optimizer = fabric.setup(net, adamw(net.parameters()))
    for _ in range(2):
        for x in joined(batches_of(fabric.global_rank, counts), model):
            optimizer.zero_grad()
            fabric.backward(model(x).square().mean())
            optimizer.step()
    with engine_of(model).full_parameters():
        return relative_error(net.parameters(), alone(counts, 2).parameters())


@pytest.mark.parametrize("row", everyday(ROWS))
def test_a_joined_loop_with_fabric(ranks2: Ranks, row: str) -> None:
    assert max(ranks2.run(looped, row, [3, 1])) < EXACT
