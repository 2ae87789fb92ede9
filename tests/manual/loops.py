"""Manual loops with an Accelerator, and the plain loop on one process that they must equal."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from models import Net, Samples, values
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from lightning_accel import Accelerator

ROWS = ["ddp", "zero1", "zero2", "fsdp"]
GLOBAL_BATCH = 8
MAX_NORM = 0.3


def new_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)


def batches_of(split: bool, *, size: int = 32, ranks: int | None = None) -> DataLoader[Any]:
    """A loader to prepare: batches that all ranks share, or one rank's."""
    ranks = dist.get_world_size() if ranks is None else ranks
    return DataLoader(Samples(size), batch_size=GLOBAL_BATCH if split else GLOBAL_BATCH // ranks)


def train(
    row: str,
    split: bool,
    steps: int,
    *,
    zero_first: bool = False,
    epochs: int = 2,
    size: int = 32,
) -> tuple[dict[str, Tensor], list[tuple[bool, float]], list[float]]:
    """Parameters, whether each micro-batch has ended a window and the learning rate after it; norms before clipping."""
    accelerator = Accelerator(strategy=row, split_batches=split, gradient_accumulation_steps=steps, cpu=True)
    net = Net()
    optimizer = new_optimizer(net)
    scheduler: Any = ExponentialLR(optimizer, 0.9)
    given = (scheduler, batches_of(split, size=size), optimizer, net)
    scheduler, loader, prepared, model = accelerator.prepare(*given)
    rhythm, norms = [], []
    for _ in range(epochs):
        for _, x, y in loader:
            with accelerator.accumulate(model):
                if zero_first:
                    prepared.zero_grad()
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                norm = accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                prepared.step()
                scheduler.step()
                if not zero_first:
                    prepared.zero_grad()
            norms += [] if norm is None else [norm.item()]
            rhythm.append((accelerator.sync_gradients, optimizer.param_groups[0]["lr"]))
    return values(net), rhythm, norms


def plain(steps: int, schedule: int, *, epochs: int = 2, size: int = 32) -> tuple[dict[str, Tensor], list[float]]:
    """The same on one process, without an Accelerator: parameters, and norms before clipping.

    Args:
        steps: Micro-batches of a window; the last one of an epoch may be shorter.
        schedule: Steps of the schedule after each optimizer step.
        epochs: How many.
        size: Samples.
    """
    net = Net()
    optimizer = new_optimizer(net)
    scheduler = ExponentialLR(optimizer, 0.9)
    norms = []
    for _ in range(epochs):
        batches = list(batches_of(True, size=size, ranks=1))
        for start in range(0, len(batches), steps):
            window = batches[start : start + steps]
            losses = [nn.functional.mse_loss(net(x), y) for _, x, y in window]
            (torch.stack(losses).sum() / len(window)).backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM).item())
            optimizer.step()
            for _ in range(schedule):
                scheduler.step()
            optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}, norms
