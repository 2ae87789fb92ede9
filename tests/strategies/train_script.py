"""A user's script: what tests start as a process of its own, with a launcher that starts the other ranks.

All processes carry the marker in their command line, so that a test can tell whether one is left.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Data, Net, Regression, loader, trainer, values
from torch import Tensor


class Failing(Regression):
    """Raises, or is killed, in the middle of training."""

    def __init__(self, rank: int, how: str, at: int = 2) -> None:
        super().__init__()
        self.rank, self.how, self.at = rank, how, at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == self.rank and self.trainer.global_step == self.at:
            print(f"failing at {time.time()}", flush=True)
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise LookupError(f"no more luck on rank {self.rank}")
        return super().training_step(batch, batch_idx)


class Different(Regression):
    """Another structure on rank 1."""

    def configure_model(self) -> None:
        if self.global_rank == 1:
            self.net.last = torch.nn.Linear(5, 3, bias=False, dtype=torch.float64)


def run_fabric(fabric: Fabric) -> None:
    """A loop that ends with a step: under ZeRO, updated parameters are on their way when the script ends."""
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))
    for _, x, y in loader():
        optimizer.zero_grad()
        fabric.backward(torch.nn.functional.mse_loss(model(x), y))
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", required=True)
    parser.add_argument("--marker", required=True)
    parser.add_argument("--fail", nargs=2, metavar=("RANK", "HOW"))
    parser.add_argument("--keep", type=Path, help="save checkpoints here: every epoch, and after an exception")
    parser.add_argument("--different", action="store_true")
    parser.add_argument("--fabric", action="store_true")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    if arguments.fabric:
        Fabric(accelerator="cpu", devices=2, strategy=arguments.strategy).launch(run_fabric)
        return
    module: pl.LightningModule = Regression()
    if arguments.fail:
        module = Failing(int(arguments.fail[0]), arguments.fail[1], at=6 if arguments.keep else 2)
    if arguments.different:
        module = Different()
    used = trainer(arguments.strategy)
    if arguments.keep:
        save = ModelCheckpoint(arguments.keep, filename="{step}", save_top_k=-1, save_on_exception=True)
        used = trainer(arguments.strategy, max_epochs=3, callbacks=[save], enable_checkpointing=True)
    used.fit(module, datamodule=Data())
    metrics = {name: value.item() for name, value in used.callback_metrics.items()}
    if used.is_global_zero and arguments.save:
        torch.save({"values": values(module), "metrics": metrics}, arguments.save)


if __name__ == "__main__":
    main()
