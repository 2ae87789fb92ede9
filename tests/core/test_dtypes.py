"""Mixed precision: what the model computes with is narrower than what the optimizer updates."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.toys import adamw, build, data, my_share, relative_error, values
from harness import Ranks
from lightning_accel.core import Engine
from rows import everyday

EXACT = 1e-12  # double precision, two orders of the same sums
MIXED = ["zero1", "zero2", "fsdp", "fsdp_partial"]


class Affine(nn.Module):
    """A linear layer that computes in double with whatever its weight was rounded to."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -0.5, 0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.double().T + self.bias)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Affine(7, 13)
        self.blocks = nn.ModuleList(Affine(13, 13) for _ in range(3))
        self.last = Affine(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def loss_of(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((module(x) - y) ** 2).mean()


def train_alone(master: nn.Module, steps: int, ranks: int, accumulate: int, clip: float | None) -> None:
    """What mixed precision means: forward and backward on rounded weights, for each rank's share by itself, gradients
    added up and weights updated in double."""
    optimizer = adamw(master.parameters())
    xs, ys = data(steps * accumulate, ranks)
    for step in range(steps):
        optimizer.zero_grad()
        for parameter in master.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for i in range(step * accumulate, (step + 1) * accumulate):
            for rank in range(ranks):
                rounded = build(Layers)
                for parameter, precise in zip(rounded.parameters(), master.parameters(), strict=True):
                    narrow = precise.dim() > 1
                    parameter.data = precise.detach().to(torch.float32 if narrow else torch.float64)
                (loss_of(rounded, xs[i][rank::ranks], ys[i][rank::ranks]) / accumulate).backward()
                for parameter, precise in zip(rounded.parameters(), master.parameters(), strict=True):
                    precise.grad += parameter.grad.double() / ranks
        if clip is not None:
            nn.utils.clip_grad_norm_(master.parameters(), clip)
        optimizer.step()


def train(engine: Engine, optimizer: Any, steps: int, accumulate: int, clip: float | None) -> None:
    xs, ys = data(steps * accumulate, dist.get_world_size())
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            i = step * accumulate + micro
            loss = loss_of(engine.module, my_share(xs[i]), my_share(ys[i])) / accumulate
            with engine.no_sync() if micro < accumulate - 1 else contextlib.nullcontext():
                engine.backward(loss)
        if clip is not None:
            engine.clip_grad_norm_(optimizer, clip)
        optimizer.step()


def errors(row: str, accumulate: int, **options: Any) -> tuple[float, float]:
    """Of master values, before and after the end."""
    alone, module = build(Layers), build(Layers)
    train_alone(alone, 20, dist.get_world_size(), accumulate, clip=0.05)
    engine = Engine(module, row, param_dtype=torch.float32, bucket_cap_mb=0.0005, **options)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 20, accumulate, clip=0.05)
    within = relative_error(values(engine), alone.parameters())
    engine.close()
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    return within, relative_error(module.parameters(), alone.parameters())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("row", everyday(MIXED))
def test_master_values_are_those_of_a_single_process(ranks2: Ranks, row: str, accumulate: int) -> None:
    """Sent in double, so that gradients are not rounded once more than by autograd."""
    reduce = {} if row == "zero1" else {"reduce_dtype": torch.float64}
    for found in ranks2.run(errors, row, accumulate, **reduce):
        assert max(found) < EXACT
