"""Two optimizers, and gradients of the first that overflow in one element: no rank takes its step, all take the other.

The element comes to be infinite in two ways. Either one rank's backward makes it so, before gradients are added up, and
it is then in the part of whichever rank updates it; or it is one rank's alone from the start, which no reduction
leaves behind: what a rank alone has seen must stop all of them.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry
from models import ROWS, Net, loader, trainer, values
from torch import Tensor, nn

from harness import Ranks
from lightning_accel import engine_of

SCALE = 2.0**10
BAD = 1  # the step, and the rank


class Infinite:
    """Makes one element of the first optimizer's gradients infinite, on one rank, in one step."""

    def __init__(self, net: Net, where: str) -> None:
        self.net = net
        self.where = where
        self.step = 0
        if where == "backward":
            net.blocks[1].linear.weight.register_hook(self._within)

    @property
    def _is_due(self) -> bool:
        return self.step == BAD and dist.get_rank() == BAD

    def _within(self, gradient: Tensor) -> Tensor:
        if not self._is_due:
            return gradient
        changed = gradient.clone()
        changed[2, 3] = math.inf
        return changed

    def after_backward(self) -> None:
        """Of several copies of the state this is in one."""
        if self._is_due and self.where == "part":
            engine_of(self.net).optimizers[0].gradients.tensors()[-1][-1] = math.inf


def two_optimizers(net: Net) -> list[torch.optim.Optimizer]:
    blocks, others = net.blocks.parameters(), [*net.first.parameters(), *net.last.parameters()]
    return [torch.optim.AdamW(blocks, lr=0.01), torch.optim.SGD(others, lr=0.1)]


class Manual(pl.LightningModule):
    def __init__(self, where: str, clip: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = Net(dtype=torch.float32)
        self.infinite = Infinite(self.net, where)
        self.clip = clip
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        _, x, y = batch
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self.net(x), y))
        self.infinite.after_backward()
        for optimizer in optimizers:
            if self.clip:
                self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()

    def on_train_batch_end(self, *_: Any) -> None:
        self.infinite.step += 1
        scaler = self.trainer.scaler
        self.seen.append((values(self.net), scaler.skipped_steps, scaler.get_scale()))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return two_optimizers(self.net)


def strategy(registry: Any, row: str, settings: dict[str, Any]) -> Any:
    entry = registry[f"accel_{row}"]
    return entry["strategy"](**entry["init_params"], **settings)


def in_trainer(row: str, where: str, clip: bool, settings: dict[str, Any]) -> list[Any]:
    module = Manual(where, clip)
    used = trainer(strategy(StrategyRegistry, row, settings), devices=dist.get_world_size(), precision="16-mixed")
    used.scaler.update(SCALE)
    used.fit(module, loader(dtype=torch.float32))
    return module.seen


def in_fabric(row: str, where: str, clip: bool, settings: dict[str, Any]) -> list[Any]:
    chosen = strategy(STRATEGY_REGISTRY, row, settings)
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=chosen, precision="16-mixed")
    fabric.launch()
    scaler = chosen.grad_scaler
    scaler.update(SCALE)
    net = Net(dtype=torch.float32)
    infinite = Infinite(net, where)
    model, *optimizers = fabric.setup(net, *two_optimizers(net))
    seen = []
    for _, x, y in loader(dtype=torch.float32):
        for optimizer in optimizers:
            optimizer.zero_grad()
        fabric.backward(nn.functional.mse_loss(model(x), y))
        infinite.after_backward()
        for optimizer in optimizers:
            if clip:
                fabric.clip_gradients(model, optimizer, max_norm=0.5, error_if_nonfinite=False)
            optimizer.step()
        infinite.step += 1
        seen.append((values(net), scaler.skipped_steps, scaler.get_scale()))
    engine_of(net).close()
    return seen


SURFACES = {"trainer": in_trainer, "fabric": in_fabric}


def both_ways(surface: str, row: str, clip: bool, settings: dict[str, Any]) -> dict[str, list[Any]]:
    return {where: SURFACES[surface](row, where, clip, settings) for where in ("backward", "part")}


def require_skipped_by_all(results: list[dict[str, list[Any]]]) -> None:
    for where, first in results[0].items():
        start = values(Net(dtype=torch.float32))
        for found in (result[where] for result in results):
            steps, skipped, scales = zip(*found, strict=True)
            assert skipped == (0, 1, 1, 1)
            assert scales == (SCALE, SCALE / 2, SCALE / 2, SCALE / 2)
            for step, (before, after) in enumerate(zip([start, *steps], steps, strict=False)):
                for name, value in after.items():
                    assert bool(torch.isfinite(value).all())
                    stays = step == BAD and name.startswith("blocks.")
                    assert torch.equal(before[name], value) == stays, (where, step, name)
            for ours, (theirs, _, _) in zip(steps, first, strict=True):
                assert all(torch.equal(ours[name], theirs[name]) for name in ours), "ranks differ"


EVERYDAY = [("trainer", "fsdp", True), ("fabric", "zero2", False)]
GRID = [line for line in itertools.product(SURFACES, ROWS, (False, True)) if line not in EVERYDAY]


@pytest.mark.parametrize(
    ("surface", "row", "clip"), [*EVERYDAY, *(pytest.param(*line, marks=pytest.mark.matrix) for line in GRID)]
)
def test_all_ranks_skip_one_optimizer_and_step_with_the_other(
    ranks2: Ranks, surface: str, row: str, clip: bool
) -> None:
    require_skipped_by_all(ranks2.run(both_ways, surface, row, clip, {}))


@pytest.mark.matrix
@pytest.mark.parametrize("shard_size", [1, 2, 4])
@pytest.mark.parametrize("surface", SURFACES)
def test_ranks_of_all_copies_do(ranks_of: Any, surface: str, shard_size: int) -> None:
    settings = {"shard_size": shard_size}
    require_skipped_by_all(ranks_of(4).run(both_ways, surface, "fsdp_hybrid", True, settings))
