"""What accumulated micro-batches count: each the same, however many there are, or by a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from models import Regression, Samples, assert_close, loader, trainer, values
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from harness import Ranks
from lightning_accel import engine_of
from lightning_accel.strategies import AccelDDPStrategy, AccelFSDPStrategy, AccelZeROStrategy
from rows import everyday

ACCUMULATE = 3
EPOCHS = 5
STRATEGIES: dict[str, Any] = {
    "ddp": AccelDDPStrategy,
    "zero1": lambda **options: AccelZeROStrategy(stage=1, **options),
    "zero2": lambda **options: AccelZeROStrategy(stage=2, **options),
    "fsdp": AccelFSDPStrategy,
    "fsdp_partial": lambda **options: AccelFSDPStrategy(sharding="partial", **options),
}


def single_process(windows: list[list[Tensor]], epochs: int = EPOCHS) -> dict[str, Tensor]:
    """Plain torch: each window is one batch of the samples that are counted, each as often as any other."""
    module = Regression()
    data = Samples()
    start = values(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    for _ in range(epochs):
        for window in windows:
            optimizer.zero_grad()
            index = torch.cat(window)
            mse_loss(module(data.x[index]), data.y[index]).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
    assert all((start[name] - value).norm() > 1e-2 for name, value in values(module).items()), "void"
    return values(module)


class Constant(Regression):
    """With a constant learning rate."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def fit(module: Any, strategy: Any, options: dict[str, Any], **settings: Any) -> dict[str, Tensor]:
    used = trainer(
        STRATEGIES[strategy](**options),
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=0.5,
        **settings,
    )
    used.fit(module, loader())
    return values(module)


def fit_constant(row: str) -> dict[str, Tensor]:
    return fit(Constant(), row, {})


@pytest.mark.parametrize("row", everyday(list(STRATEGIES)))
def test_a_short_last_window_is_the_mean_over_the_batches_that_were_there(ranks2: Ranks, row: str) -> None:
    batches = [torch.arange(8 * i, 8 * i + 8) for i in range(4)]
    expected = single_process([batches[:3], batches[3:]])
    for result in ranks2.run(fit_constant, row):
        assert_close(result, expected)


def counted(index: Tensor) -> Tensor:
    """Which samples count: those of the first rank's share mostly, and none of some batches."""
    return ((index % 2 == 0) | (index % 5 == 0)) & (index // 4 != 1)


class Masked(Constant):
    """The mean over the samples that count, NaN if there are none. Says so by itself, or leaves it to the strategy."""

    def __init__(self, says: bool) -> None:
        super().__init__()
        self.says = says

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, x, y = batch
        mask = counted(index)
        if self.says:
            self.trainer.strategy.engine.set_loss_weight(mask.sum())
        return mse_loss(self(x)[mask], y[mask])


def weight_of(batch: Any) -> Tensor:
    return counted(batch[0]).sum()


def fit_masked(row: str, says: bool) -> dict[str, Tensor]:
    return fit(Masked(says), row, {} if says else {"loss_weight": weight_of})


def counted_windows() -> list[list[Tensor]]:
    batches = [torch.arange(8 * i, 8 * i + 8) for i in range(4)]
    return [[batch[counted(batch)] for batch in window] for window in (batches[:3], batches[3:])]


@pytest.mark.parametrize("says", [True, False], ids=["module", "strategy"])
@pytest.mark.parametrize("row", everyday(list(STRATEGIES)))
def test_with_weights_each_sample_counts_the_same(ranks2: Ranks, row: str, says: bool) -> None:
    expected = single_process(counted_windows())
    for result in ranks2.run(fit_masked, row, says):
        assert_close(result, expected)


def loop_in_fabric(row: str, modules: int) -> dict[str, Tensor]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=f"accel_{row}")
    fabric.launch()
    net = Regression()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))
    for _ in range(modules - 1):
        other = nn.Linear(2, 2)
        fabric.setup(other, torch.optim.SGD(other.parameters(), lr=0.1))
    for _ in range(EPOCHS):
        for number, (index, x, y) in enumerate(loader()):
            if number in (0, ACCUMULATE):
                optimizer.zero_grad()
            with fabric.no_backward_sync(model, enabled=number not in (ACCUMULATE - 1, 3)):
                mask = counted(index)
                loss = mse_loss(model(x)[mask], y[mask])
                engine_of(net).set_loss_weight(mask.sum())
                fabric.backward(loss)
            if number in (ACCUMULATE - 1, 3):
                fabric.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
    with engine_of(net).full_parameters():
        return values(net)


@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("row", everyday(list(STRATEGIES)))
def test_weights_in_fabric(ranks2: Ranks, row: str, modules: int) -> None:
    expected = single_process(counted_windows())
    for result in ranks2.run(loop_in_fabric, row, modules):
        assert_close(result, expected)
