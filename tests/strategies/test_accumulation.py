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


class Turns(Regression):
    """Two optimizers under manual optimization, each of which has a backward in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        index, x, y = batch
        mask = counted(index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.toggle_optimizer(optimizer)
            self.manual_backward(mse_loss(self(x)[mask], y[mask]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        blocks, others = self.net.blocks.parameters(), [*self.net.first.parameters(), *self.net.last.parameters()]
        return [torch.optim.AdamW(blocks, lr=0.02), torch.optim.AdamW(others, lr=0.02)]


def fit_in_turns(row: str) -> dict[str, Tensor]:
    module = Turns()
    trainer(STRATEGIES[row](loss_weight=weight_of), max_epochs=2).fit(module, loader())
    return values(module)


@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_the_strategys_weight_is_for_every_backward_of_a_step(ranks2: Ranks, row: str) -> None:
    expected = Turns()
    optimizers = expected.configure_optimizers()
    for _ in range(2):
        for index, x, y in loader():
            for optimizer in optimizers:
                optimizer.zero_grad()
                mse_loss(expected(x)[counted(index)], y[counted(index)]).backward()
                optimizer.step()
    for result in ranks2.run(fit_in_turns, row):
        assert_close(result, values(expected))


class Skipping(Constant):
    """Has no loss for the last batch of a window, which Lightning allows to a single process."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx in (2, 3) else super().training_step(batch, batch_idx)


def test_what_has_no_loss_does_not_count(ranks_of: Any) -> None:
    expected = single_process([[torch.arange(16)]])
    for result in ranks_of(1).run(fit_skipping):
        assert_close(result, expected)


def fit_skipping() -> dict[str, Tensor]:
    used = trainer(
        AccelZeROStrategy(stage=2), devices=1, max_epochs=EPOCHS, accumulate_grad_batches=4, gradient_clip_val=0.5
    )
    used.fit(module := Skipping(), loader())
    return values(module)


def loop_in_fabric(row: str, modules: int) -> dict[str, Tensor]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=f"accel_{row}")
    fabric.launch()
    net = Regression()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))
    for _ in range(modules - 1):
        other, frozen = nn.Linear(2, 2), nn.Linear(2, 2)
        kept = [fabric.setup(other, torch.optim.SGD(other.parameters(), lr=0.1)), fabric.setup_module(frozen)]
        assert len(kept) == 2
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
