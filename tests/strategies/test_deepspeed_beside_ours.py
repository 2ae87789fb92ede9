"""The same DeepSpeed file on the same data, by DeepSpeed itself and by this engine, on two ranks.

Needs the extra `deepspeed`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Net, Regression, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from harness import Ranks
from lightning_accel.strategies import AccelZeROStrategy

pytestmark = [
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="needs DeepSpeed, which is not installed (extra `deepspeed`)"
    ),
    pytest.mark.timeout(900),  # to import it takes longer than anything else here
]

STEPS, ACCUMULATE, MICRO = 20, 2, 4
# fp32 has 24 bits, and sums are taken in another order; the issue asks for this over 20 steps.
RELATIVE = 1e-5
FILE: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": MICRO,
    "gradient_accumulation_steps": ACCUMULATE,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True, "weight_decay": 0.1}},
}
LIMITS: dict[int, dict[str, float]] = {
    1: {"gradient_clipping": 0.05},
    2: {},  # and then DeepSpeed clips to 1.0
    3: {"gradient_clipping": 0.05},
}


def samples() -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches; the first gradients are larger than any limit."""
    generator = torch.Generator().manual_seed(11 + dist.get_rank())
    x = torch.randn(STEPS * ACCUMULATE, MICRO, 5, generator=generator)
    return [(each, 5.0 * each[:, :3].sin()) for each in x]


def by_deepspeed(config: dict[str, Any]) -> list[float]:
    os.environ["DS_ACCELERATOR"] = "cpu"
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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_are_the_same(ranks2: Ranks, stage: int) -> None:
    config = {**FILE, **LIMITS[stage], "zero_optimization": {"stage": stage}}
    theirs, ours = ranks2.run(by_deepspeed, config), ranks2.run(by_ours, config)
    assert len(ours[0]) == STEPS * ACCUMULATE
    assert ours[0][-1] < 0.9 * ours[0][0], "void"
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=RELATIVE, atol=0.0)
