"""A case of the zoo as a LightningModule."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import zoo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightning_accel  # noqa: F401  (registers the strategies)


class Batches(Dataset[Any]):
    """The micro-batches that this rank sees, in order. Each rank has its own, so no sampler is needed.

    Args:
        name: The case.
        count: How many this rank has.
    """

    def __init__(self, name: str, count: int = zoo.STEPS * zoo.ACCUMULATE) -> None:
        self.name = name
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return zoo.CASES[self.name].batch(number, dist.get_rank())


def loader(name: str, count: int = zoo.STEPS * zoo.ACCUMULATE) -> DataLoader:
    return DataLoader(Batches(name, count), batch_size=None)


class Lit(pl.LightningModule):
    """Trains a case; a language model writes text to predict."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.case = zoo.CASES[name]
        self.net = zoo.build(self.case.make)
        if dist.get_rank() > 0:  # the engine must overwrite it with rank 0's
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter.add_(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.case.loss(self.net, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.case.loss(self.net, batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return write(self.net, batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return zoo.make_optimizer(self.parameters())


def write(model: Any, batch: Tensor, number: int) -> Tensor:
    """Continue a batch's first tokens greedily: more of them, and for longer, the higher its number."""
    return model.generate(batch[:, : 2 + number], max_new_tokens=5 + number, do_sample=False)


def fit(name: str, row: str) -> tuple[pl.Trainer, Lit]:
    trainer = pl.Trainer(
        strategy=f"accel_{row}",
        accelerator="cpu",
        devices=dist.get_world_size(),
        precision="64-true",
        max_epochs=1,
        accumulate_grad_batches=zoo.ACCUMULATE,
        gradient_clip_val=zoo.MAX_NORM,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Lit(name)
    trainer.fit(module, loader(name))
    assert trainer.global_step == zoo.STEPS
    return trainer, module


def check_fit(name: str, row: str) -> None:
    """The Trainer ends with the parameters of the single process. For ``ranks.run``."""
    _, module = fit(name, row)
    expected = zoo.alone(name, dist.get_world_size())
    zoo.require_equal(zoo.snapshot(module.net, expected.norms), expected)
