"""A script: trains the model of this folder under a row on two gloo processes, in whatever environment runs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from litnet import SAMPLES, LitNet, loader, trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_accel.strategies import AccelFSDPStrategy, AccelZeROStrategy

RANKS, BATCHES = 2, 5
STRATEGIES = {"accel_fsdp": AccelFSDPStrategy, "accel_zero2": AccelZeROStrategy}


class Divided(LitNet):
    """Its ranks have the samples of a global batch among them."""

    def train_dataloader(self) -> Any:
        dataset = loader(BATCHES).dataset
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, shuffle=False)
        return DataLoader(dataset, batch_size=SAMPLES // RANKS, sampler=sampler)


def main() -> None:
    """Train, and leave a checkpoint and the model's values behind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("strategy", choices=STRATEGIES)
    parser.add_argument("kind", choices=["full", "sharded"])
    parser.add_argument("epochs", type=int)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("values", type=Path)
    parser.add_argument("--resume", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Divided(schedule=True)
    strategy = STRATEGIES[chosen.strategy](state_dict_type=chosen.kind)
    fit = trainer(
        strategy,
        accelerator="cpu",
        devices=RANKS,
        max_epochs=chosen.epochs,
        gradient_clip_val=0.3,
        use_distributed_sampler=False,
    )
    fit.fit(model, ckpt_path=chosen.resume)
    fit.save_checkpoint(chosen.checkpoint)
    if fit.is_global_zero:
        torch.save(model.state_dict(), chosen.values)


if __name__ == "__main__":
    main()
