"""The same DeepSpeed file on the same data, by DeepSpeed itself and by this engine, on two ranks.

Needs the extra `deepspeed`.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from beside_deepspeed import NEEDS_DEEPSPEED, RELATIVE
from models import Net, Regression, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from harness import Ranks
from lightning_accel import Accelerator
from lightning_accel.strategies import AccelZeROStrategy

pytestmark = NEEDS_DEEPSPEED

STEPS, ACCUMULATE, MICRO = 20, 2, 4
FILE: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": MICRO,
    "gradient_accumulation_steps": ACCUMULATE,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True, "weight_decay": 0.1}},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "LRRangeTest": {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 4},
    "OneCycle": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 8, "decay_lr_rate": 0.01},
    "WarmupLR": {"warmup_max_lr": 1e-2, "warmup_num_steps": 6},
    "WarmupDecayLR": {"warmup_max_lr": 1e-2, "warmup_num_steps": 6, "total_num_steps": STEPS},
    "WarmupCosineLR": {"warmup_num_steps": 6, "total_num_steps": STEPS},
}
CASES: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.05},
    "zero2": {"zero_optimization": {"stage": 2}},  # and then DeepSpeed clips to 1.0
    "zero3": {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.05},
}
CASES |= {
    name: {"zero_optimization": {"stage": 2}, "scheduler": {"type": name, "params": params}}
    for name, params in SCHEDULES.items()
}


def samples() -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches; the first gradients are larger than any limit."""
    generator = torch.Generator().manual_seed(11 + dist.get_rank())
    x = torch.randn(STEPS * ACCUMULATE, MICRO, 5, generator=generator)
    return [(each, 5.0 * each[:, :3].sin()) for each in x]


def all_by_deepspeed() -> dict[str, list[float]]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # A minute's compilation, for what gloo does as well.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    return {name: by_deepspeed({**FILE, **case}) for name, case in CASES.items()}


def by_deepspeed(config: dict[str, Any]) -> list[float]:
    import deepspeed

    net = Net(dtype=torch.float32)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
    losses = []
    for x, y in samples():
        loss = nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


class Same(Regression):
    """Leaves the optimizer to the file, and notes its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(dtype=torch.float32)
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return None


def by_ours(config: dict[str, Any]) -> list[float]:
    x, y = (torch.cat(parts) for parts in zip(*samples(), strict=True))
    module = Same()
    used = trainer(AccelZeROStrategy(config=config), use_distributed_sampler=False)
    used.fit(module, DataLoader(TensorDataset(x, y), batch_size=MICRO))
    return module.losses


@pytest.fixture(scope="module")
def theirs() -> list[dict[str, list[float]]]:
    """By ranks of their own: DeepSpeed keeps process groups, and much else, for as long as the process lives."""
    with Ranks(2, timeout=600) as ranks:
        return ranks.run(all_by_deepspeed)


@pytest.mark.parametrize("name", [*CASES])
def test_losses_are_the_same(theirs: list[dict[str, list[float]]], ranks2: Ranks, name: str) -> None:
    if name in SCHEDULES:
        pytest.importorskip("lightning_accel.schedules")
    ours = ranks2.run(by_ours, {**FILE, **CASES[name]})
    assert len(ours[0]) == STEPS * ACCUMULATE
    assert abs(ours[0][-1] / ours[0][0] - 1) > 0.05, "void"
    expected = torch.tensor([losses[name] for losses in theirs])
    torch.testing.assert_close(torch.tensor(ours), expected, rtol=RELATIVE, atol=0.0)


def by_accelerator(config: dict[str, Any]) -> list[float]:
    """A manual loop, as Accelerate's users write it; the file's clipping and accumulation are the Accelerator's."""
    accelerator = Accelerator(deepspeed_config=config, cpu=True)
    net = Net(dtype=torch.float32)
    model, optimizer = accelerator.prepare(net, accelerator.make_optimizer(net))
    losses = []
    for x, y in samples():
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert accelerator.fabric.strategy.stage == config["zero_optimization"]["stage"]  # type: ignore[attr-defined]
    return losses


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_losses_of_a_manual_loop_are_the_same(theirs: list[dict[str, list[float]]], ranks2: Ranks, name: str) -> None:
    ours = ranks2.run(by_accelerator, {**FILE, **CASES[name]})
    assert len(ours[0]) == STEPS * ACCUMULATE
    assert abs(ours[0][-1] / ours[0][0] - 1) > 0.05, "void"
    expected = torch.tensor([losses[name] for losses in theirs])
    torch.testing.assert_close(torch.tensor(ours), expected, rtol=RELATIVE, atol=0.0)
