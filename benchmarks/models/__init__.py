"""The models, their batches and their optimizer: the same for every peer, all drawn from `Config.seed`."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.config import Config
from benchmarks.models.gpt import GPTTask
from benchmarks.models.mlp import MLPTask
from benchmarks.models.resnet import ResNetTask

# The batches of this many steps are made once and reused in a circle, so that making them costs a timed step nothing.
STEPS_IN_BANK = 16

Batch = tuple[Tensor, ...]
"""What a model is called with, one argument a tensor."""


class Task(Protocol):
    """A model of some size and what it trains on."""

    @property
    def unit(self) -> str:
        """What throughput is counted in."""

    @property
    def units_per_row(self) -> int:
        """How many of them a row of a batch has."""

    @property
    def micro_batch(self) -> int:
        """The rows of one micro-batch of one rank."""

    def build(self, *, recompute: bool) -> nn.Module:
        """The model: called with a batch, it returns the mean loss; its `blocks` are what peers shard one by one.

        Args:
            recompute: Whether its blocks throw activations away in forward and compute them again in backward.
        """

    def draw(self, size: tuple[int, ...], generator: torch.Generator) -> Batch:
        """Batches of as many rows as `size` says; every tensor begins with these dimensions."""


MODELS: dict[str, Task] = {
    # 4,096 tokens make the two untied tables 4.2M parameters, which brings six blocks of 3.15M to 23.2M.
    "gpt-23m": GPTTask(vocabulary=4096, dim=512, layers=6, heads=8, sequence=128, micro_batch=4),
    "gpt-80m": GPTTask(vocabulary=4096, dim=768, layers=10, heads=12, sequence=128, micro_batch=4),
    "gpt-tiny": GPTTask(vocabulary=256, dim=64, layers=2, heads=4, sequence=32, micro_batch=2),
    # Primes: nothing divides by a number of ranks, and no row ends where a shard does.
    "mlp": MLPTask(inputs=251, hidden=1021, layers=5, outputs=13, micro_batch=17),
    "resnet": ResNetTask(widths=(48, 96, 192), blocks_per_width=2, side=32, classes=10, micro_batch=4),
}


def build_model(config: Config) -> nn.Module:
    """The model with the initial weights that every rank of every peer starts from."""
    torch.manual_seed(config.seed)
    return MODELS[config.model].build(recompute=config.recompute)


def build_optimizer(parameters: Iterable[nn.Parameter], config: Config) -> torch.optim.AdamW:
    """The optimizer that every peer runs, torch's fused AdamW."""
    return torch.optim.AdamW(parameters, lr=config.learning_rate, eps=config.epsilon, fused=True)


def units_per_step(config: Config) -> int:
    """How many tokens or samples all ranks together train on in one optimizer step."""
    task = MODELS[config.model]
    return config.ranks * config.accumulate * task.micro_batch * task.units_per_row


class Batches:
    """The batches of the whole job, of which a rank takes its own micro-batches.

    Args:
        config: The run, seen from the rank.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        task = MODELS[config.model]
        size = (STEPS_IN_BANK, config.accumulate, config.ranks, task.micro_batch)
        self.bank = task.draw(size, torch.Generator().manual_seed(config.seed))
        """Tensors of (steps, micro-batches, ranks, rows of a micro-batch, …)."""

    def of_rank(self, step: int) -> list[Batch]:
        """This rank's micro-batches (rows, …) of optimizer step `step`."""
        mine = [tensor[step % STEPS_IN_BANK, :, self.config.rank] for tensor in self.bank]
        return list(zip(*mine, strict=True))

    def of_all_ranks(self, step: int) -> list[Batch]:
        """The micro-batches (ranks * rows, …) that all ranks together see in optimizer step `step`."""
        whole = [tensor[step % STEPS_IN_BANK].flatten(1, 2) for tensor in self.bank]
        return list(zip(*whole, strict=True))
