"""Rows × optimizer × accumulation × clipping × number of ranks, in the Trainer and in Fabric, against one process.

The single-process run is plain torch on the same global batches. After 20 optimizer steps each parameter must agree
with it in norm: to 1e-12 in double precision, where two correct runs differ by the order of sums alone (about 1e-15
after 20 steps) and a bug shows at once; to 1e-5 in single precision, whose rounding unit of 6e-8 gives about 1e-6.

The matrix is marked ``matrix``; every run has one line through each of its axes. Activation checkpointing and
compiled blocks change what runs forward and backward, offload where the optimizer works, and neither what happens to
gradients: they are crossed with the rows and the surfaces, and with each other, only. Hybrid shard takes four ranks.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_accel  # noqa: F401  (registers the strategies)

STEPS = 20
BATCH = 2  # samples a rank and micro-batch
TOLERANCE = {"64-true": 1e-12, "32-true": 1e-5}
# torch's Muon orthogonalises in bfloat16 whatever the parameters' type. A last-bit difference of fp32 gradients tips
# roundings there, which double precision is too fine to do: two steps of its unit of 2**-8. The same deviation shows
# under accel_ddp, which runs torch's optimizer on the plain parameters.
MUON_SINGLE = 2**-7
ROWS = ["accel_ddp", "accel_zero1", "accel_zero2", "accel_fsdp", "accel_fsdp_partial"]
RECOMPUTED = {"activation_checkpointing": True}
COMPILED = {"compile": {"backend": "aot_eager"}}  # inductor would take a minute for each
OFFLOADED = {"offload": "optimizer", "offload_dir": tempfile.gettempdir()}
TWO_COPIES = {"shard_size": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": RECOMPUTED,
    "compiled": COMPILED,
    "offloaded": OFFLOADED,
    "recomputed and compiled": RECOMPUTED | COMPILED,
    "recomputed and offloaded": RECOMPUTED | OFFLOADED,
    "compiled and offloaded": COMPILED | OFFLOADED,
    "recomputed, compiled and offloaded": RECOMPUTED | COMPILED | OFFLOADED,
    "two copies": TWO_COPIES,
    "two copies, recomputed and offloaded": TWO_COPIES | RECOMPUTED | OFFLOADED,
}
CLIPPING = {"off": None, "norm": 0.5, "value": 0.02}

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, foreach=True),
    "adamw-single": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, foreach=False, fused=False),
    "muon": lambda p: torch.optim.Muon(p, lr=3e-3, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=3e-3, weight_decay=0.1),
}


class Net(nn.Sequential):
    """Returns its loss: Fabric's double precision rounds a module's outputs to single, and predictions would suffer."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(super().forward(x), y)


def make_net(optimizer: str) -> Net:
    """Odd widths, so that shards cut parameters and are padded; three blocks. Muon takes matrices only."""
    bias = optimizer != "muon"
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(33, 33, bias=bias), nn.Tanh()) for _ in range(3)))
    return Net(nn.Linear(7, 33, bias=bias), nn.Tanh(), blocks, nn.Linear(33, 5, bias=bias))


def make_data(ranks: int, accumulate: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * accumulate * ranks * BATCH, 7, generator=generator)
    return TensorDataset(x, torch.stack([x.sum(1).sin(), *x[:, :4].square().unbind(1)], 1))


def clip(parameters: Any, how: str) -> None:
    if how == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, CLIPPING["norm"])
    elif how == "value":
        torch.nn.utils.clip_grad_value_(parameters, CLIPPING["value"])


@functools.cache
def single_process(optimizer: str, accumulate: int, clipping: str, ranks: int, precision: str) -> list[Tensor]:
    dtype = torch.float64 if precision == "64-true" else torch.float32
    net = make_net(optimizer).to(dtype)
    start = [p.detach().clone() for p in net.parameters()]
    made = OPTIMIZERS[optimizer](net.parameters())
    batches = iter(DataLoader(make_data(ranks, accumulate), batch_size=ranks * BATCH))
    for _ in range(STEPS):
        made.zero_grad()
        for _ in range(accumulate):
            x, y = (tensor.to(dtype) for tensor in next(batches))
            (net(x, y) / accumulate).backward()
        clip(net.parameters(), clipping)
        made.step()
    moved = min(float((p.detach() - s).norm() / s.norm()) for p, s in zip(net.parameters(), start, strict=True))
    assert moved > 1e-2, "a parameter hardly changed: the comparison would be void"
    return [p.detach() for p in net.parameters()]


class Module(pl.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.net = make_net(optimizer)
        self._chosen = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.net(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self._chosen](self.parameters())


def strategy(registry: Any, row: str, settings: dict[str, Any]) -> Any:
    """What the name stands for, with more settings; the name itself if there are none."""
    return registry[row]["strategy"](**registry[row]["init_params"], **settings) if settings else row


def in_trainer(
    row: str, optimizer: str, accumulate: int, clipping: str, precision: str, settings: dict[str, Any]
) -> nn.Module:
    ranks = dist.get_world_size()
    module = Module(optimizer)
    trainer = pl.Trainer(
        strategy=strategy(StrategyRegistry, row, settings),
        accelerator="cpu",
        devices=ranks,
        precision=precision,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIPPING[clipping],
        gradient_clip_algorithm=None if clipping == "off" else clipping,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    dataset = make_data(ranks, accumulate)
    # The Trainer's own sampler would shuffle; this one gives each rank its share of the batches of the single process.
    trainer.fit(module, DataLoader(dataset, batch_size=BATCH, sampler=DistributedSampler(dataset, shuffle=False)))
    assert trainer.global_step == STEPS
    return module.net


def in_fabric(
    row: str, optimizer: str, accumulate: int, clipping: str, precision: str, settings: dict[str, Any]
) -> nn.Module:
    ranks = dist.get_world_size()
    chosen = strategy(STRATEGY_REGISTRY, row, settings)
    fabric = Fabric(strategy=chosen, accelerator="cpu", devices=ranks, precision=precision)
    fabric.launch()
    net = make_net(optimizer)
    made = OPTIMIZERS[optimizer](net.parameters())
    net, made = fabric.setup(net, made)
    batches = iter(fabric.setup_dataloaders(DataLoader(make_data(ranks, accumulate), batch_size=BATCH)))
    for _ in range(STEPS):
        made.zero_grad()
        for micro in range(accumulate):
            x, y = next(batches)
            with fabric.no_backward_sync(net, enabled=micro < accumulate - 1):
                fabric.backward(net(x, y) / accumulate)
        if clipping == "norm":
            fabric.clip_gradients(net, made, max_norm=CLIPPING["norm"])
        elif clipping == "value":
            fabric.clip_gradients(net, made, clip_val=CLIPPING["value"])
        made.step()
    fabric.strategy.engines[0].close()
    return net.module


SURFACES = {"trainer": in_trainer, "fabric": in_fabric}


def errors(
    surface: str, row: str, optimizer: str, accumulate: int, precision: str, setting: str, clippings: list[str]
) -> dict[str, float]:
    """For each way of clipping, the largest relative error of a parameter. For ``ranks.run``."""
    found = {}
    if "compile" in SETTINGS[setting]:
        torch._dynamo.reset()  # compiled code of earlier lines counts towards the limit of versions of one function
    for clipping in clippings:
        expected = single_process(optimizer, accumulate, clipping, dist.get_world_size(), precision)
        net = SURFACES[surface](row, optimizer, accumulate, clipping, precision, SETTINGS[setting])
        found[clipping] = max(
            float((ours.detach() - theirs).norm() / theirs.norm())
            for ours, theirs in zip(net.parameters(), expected, strict=True)
        )
    return found


# One line through each axis, and both surfaces, for every run.
EVERYDAY = [
    ("trainer", "accel_ddp", "adamw-fused", 4, "64-true", 2, "plain"),
    ("trainer", "accel_zero1", "sgd", 4, "64-true", 3, "plain"),
    ("trainer", "accel_zero2", "muon", 4, "64-true", 2, "plain"),
    ("trainer", "accel_zero2", "adamw-foreach", 1, "32-true", 2, "plain"),
    ("trainer", "accel_fsdp", "adamw-fused", 4, "64-true", 2, "recomputed and compiled"),
    ("trainer", "accel_fsdp_partial", "adafactor", 1, "64-true", 3, "recomputed"),
    ("trainer", "accel_fsdp_hybrid", "adamw-fused", 4, "64-true", 4, "two copies, recomputed and offloaded"),
    ("fabric", "accel_fsdp", "sgd", 4, "64-true", 3, "plain"),
    ("fabric", "accel_ddp", "adafactor", 1, "64-true", 2, "plain"),
    ("fabric", "accel_zero1", "adamw-single", 1, "64-true", 2, "plain"),
    ("fabric", "accel_zero2", "adamw-fused", 4, "64-true", 3, "compiled"),
]


def every(count: int, *axes: Collection[Any]) -> list[tuple[Any, ...]]:
    """Of a grid every so many-th cell, by diagonals."""
    cells = itertools.product(*(enumerate(axis) for axis in axes))
    return [tuple(choice for _, choice in cell) for cell in cells if sum(i for i, _ in cell) % count == 0]


# Any choice on the other five axes meets one row, and any two choices meet each other.
GRID = every(5, SURFACES, ROWS, OPTIMIZERS, [1, 4], TOLERANCE, [2, 3], ["plain"])
# Any choice on the other axes meets one of the two surfaces.
BESIDE_PLAIN = [name for name in SETTINGS if name != "plain" and "copies" not in name]
WAYS = every(2, SURFACES, ROWS, ["adamw-fused"], [4], ["64-true"], [2], BESIDE_PLAIN)
IN_COPIES = [name for name in SETTINGS if "copies" in name]
HYBRID = every(2, SURFACES, ["accel_fsdp_hybrid"], ["adamw-fused", "adafactor"], (1, 4), TOLERANCE, [4], IN_COPIES)
MATRIX = [line for line in [*GRID, *WAYS, *HYBRID] if line not in EVERYDAY]


@pytest.mark.parametrize(
    ("surface", "row", "optimizer", "accumulate", "precision", "world", "setting"),
    [*EVERYDAY, *(pytest.param(*line, marks=pytest.mark.matrix) for line in MATRIX)],
    indirect=["world"],
)
def test_parity(surface, row, optimizer, accumulate, precision, world, setting):
    for found in world.run(errors, surface, row, optimizer, accumulate, precision, setting, list(CLIPPING)):
        limit = MUON_SINGLE if (optimizer, precision) == ("muon", "32-true") else TOLERANCE[precision]
        assert max(found.values()) < limit, found
