"""A script: trains the model of this folder under a row on two gloo processes, in whatever environment runs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from litnet import SAMPLES, LitNet, SaveAfter, loader, trainer
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
    parser.add_argument("--after", type=int, help="write the checkpoint after so many steps, and not at the end")
    parser.add_argument("--dealt", action="store_true", help="have Lightning divide the samples, which shuffles them")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LitNet(schedule=True) if chosen.dealt else Divided(schedule=True)
    strategy = STRATEGIES[chosen.strategy](state_dict_type=chosen.kind)
    fit = trainer(
        strategy,
        accelerator="cpu",
        devices=RANKS,
        max_epochs=chosen.epochs,
        callbacks=[] if chosen.after is None else [SaveAfter(chosen.after, chosen.checkpoint)],
        gradient_clip_val=0.3,
        use_distributed_sampler=chosen.dealt,
    )
    fit.fit(model, loader(BATCHES, size=SAMPLES // RANKS) if chosen.dealt else None, ckpt_path=chosen.resume)
    if chosen.after is None:
        fit.save_checkpoint(chosen.checkpoint)
    if fit.is_global_zero:
        torch.save(model.state_dict(), chosen.values)


if __name__ == "__main__":
    main()
