"""What ``accel test`` runs in each rank: does training on several ranks give what a single process gives?"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn

ROWS = ("ddp", "zero2", "fsdp")
_STEPS = 10
_FEATURES = 16
_SAMPLES_PER_RANK = 4


def train(fabric: Fabric, device: torch.device, ranks: int, rank: int) -> list[float]:
    """Train a small model in double precision.

    Args:
        fabric: What trains it; of one rank, or of ``ranks``.
        device: Where.
        ranks: How many there are; as many parts has each batch.
        rank: Whose part of the batch to take, for one of them; all of it if ``fabric`` has one rank only.

    Returns:
        The mean loss of each step, over all ranks.

    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(_FEATURES, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    inputs = torch.randn(ranks * _SAMPLES_PER_RANK, _FEATURES, dtype=torch.float64)
    targets = inputs.sum(-1, keepdim=True).sin()
    mine = slice(rank, None, ranks) if fabric.world_size > 1 else slice(None)
    batch, target = inputs[mine].to(device), targets[mine].to(device)
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
    losses = []
    for _ in range(_STEPS):
        loss = nn.functional.mse_loss(model(batch), target)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(_mean(loss.detach(), fabric))
    return losses


def _mean(loss: Tensor, fabric: Fabric) -> float:
    if fabric.world_size > 1:
        dist.all_reduce(loss)
    return loss.item() / fabric.world_size


def main() -> None:
    """Train under each row and write the losses to the file that the command line names."""
    path, accelerator = sys.argv[1:]
    losses = {}
    for row in ROWS:
        fabric = Fabric(strategy=f"accel_{row}", accelerator=accelerator)
        fabric.launch()
        losses[row] = train(fabric, fabric.device, fabric.world_size, fabric.global_rank)
    if fabric.global_rank == 0:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"losses": losses, "ranks": fabric.world_size, "device": fabric.device.type}, file)


if __name__ == "__main__":
    main()
