"""Training with an Accelerator: the result of one process, under every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import MAX_NORM, ROWS, batches_of, new_optimizer, plain, train
from models import FLOAT64, Net, Samples, assert_close, values
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

import lightning_accel
from harness import Ranks
from lightning_accel import Accelerator
from lightning_accel.strategies.fabric import AccelDDPStrategy
from rows import everyday


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("row", [*everyday(ROWS)])
def test_loop_equals_a_single_process(ranks2: Ranks, row: str, split: bool) -> None:
    """Windows of 3, and of 1 at the end of each epoch; clipping; a schedule."""
    expected, expected_norms = plain(3, schedule=1 if split else 2)
    for result, rhythm, norms in ranks2.run(train, row, split, 3):
        assert_close(result, expected)
        assert norms == pytest.approx(expected_norms, rel=FLOAT64)
        rate = 0.9 if split else 0.81
        assert rhythm == [
            (sync, pytest.approx(0.02 * rate**power))
            for sync, power in zip([False, False, True, True] * 2, [0, 0, 1, 2, 2, 2, 3, 4], strict=True)
        ]
    assert max(expected_norms) > MAX_NORM  # it does clip


@pytest.mark.matrix
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("row", ROWS)
def test_any_window_equals_a_single_process(ranks2: Ranks, row: str, steps: int) -> None:
    expected, expected_norms = plain(steps, schedule=2)
    for result, _, norms in ranks2.run(train, row, False, steps):
        assert_close(result, expected)
        assert norms == pytest.approx(expected_norms, rel=FLOAT64)


@pytest.mark.parametrize("row", everyday(ROWS))
def test_zero_grad_before_backward_keeps_what_was_accumulated(ranks2: Ranks, row: str) -> None:
    expected, _ = plain(3, schedule=2)
    for result, _, _ in ranks2.run(train, row, False, 3, zero_first=True):
        assert_close(result, expected)


def gradients_of_compressed() -> list[Tensor]:
    """Gradients after they have travelled in bf16."""
    accelerator = Accelerator(strategy=AccelDDPStrategy(reduce_dtype=torch.bfloat16), cpu=True)
    model, loader = accelerator.prepare(nn.Linear(3, 3), DataLoader(torch.randn(4, 3), batch_size=2))
    for x in loader:
        accelerator.backward(model(x).square().mean())
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_gradients_travel_in_another_dtype(ranks2: Ranks) -> None:
    first, second = ranks2.run(gradients_of_compressed)
    for gradient, other in zip(first, second, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, other)
        assert torch.equal(gradient, gradient.bfloat16().float())


def orders(seed: int) -> list[list[int]]:
    """What an Accelerator of a seed has two loaders that are alike give this rank."""
    accelerator = Accelerator(cpu=True, seed=seed)
    loaders = [DataLoader(torch.arange(20), batch_size=2, shuffle=True) for _ in range(2)]
    return [torch.cat(list(loader)).tolist() for loader in accelerator.prepare(*loaders)]


def test_loaders_of_one_seed_have_orders_of_their_own(ranks2: Ranks) -> None:
    for first, second in ranks2.run(orders, 5):
        assert first != second
    assert ranks2.run(orders, 5) == ranks2.run(orders, 5)
    assert ranks2.run(orders, 5) != ranks2.run(orders, 6)


def train_two(row: str) -> dict[str, Tensor]:
    """Two models with an optimizer each, whose gradients are clipped as one vector."""
    accelerator = Accelerator(strategy=row, gradient_accumulation_steps=2, cpu=True)
    nets = [Net(seed=1), nn.Sequential(nn.Linear(3, 3)).double()]
    with torch.no_grad():
        nets[1][0].weight.copy_(torch.eye(3))
        nets[1][0].bias.zero_()
    optimizers = [new_optimizer(nets[0]), torch.optim.SGD(nets[1].parameters(), lr=0.1, momentum=0.9)]
    loader, second, sgd, first, adam = accelerator.prepare(
        batches_of(False), nets[1], optimizers[1], nets[0], optimizers[0]
    )
    for _, x, y in loader:
        with accelerator.accumulate(first, second):
            accelerator.backward(nn.functional.mse_loss(second(first(x)), y))
            accelerator.clip_grad_norm_([*first.parameters(), *second.parameters()], 0.2)
            for optimizer in (adam, sgd):
                optimizer.step()
                optimizer.zero_grad()
    return {f"{index}.{name}": value for index, net in enumerate(nets) for name, value in values(net).items()}


def plain_two() -> dict[str, Tensor]:
    nets = [Net(seed=1), nn.Sequential(nn.Linear(3, 3)).double()]
    with torch.no_grad():
        nets[1][0].weight.copy_(torch.eye(3))
        nets[1][0].bias.zero_()
    optimizers = [new_optimizer(nets[0]), torch.optim.SGD(nets[1].parameters(), lr=0.1, momentum=0.9)]
    batches = list(batches_of(True, ranks=1))
    for pair in zip(batches[::2], batches[1::2], strict=True):
        for _, x, y in pair:
            (nn.functional.mse_loss(nets[1](nets[0](x)), y) / 2).backward()
        nn.utils.clip_grad_norm_([*nets[0].parameters(), *nets[1].parameters()], 0.2)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {
        f"{index}.{name}": p.detach().clone() for index, net in enumerate(nets) for name, p in net.named_parameters()
    }


@pytest.mark.parametrize("row", everyday(ROWS))
def test_several_models_are_clipped_as_one(ranks2: Ranks, row: str) -> None:
    expected = plain_two()
    for result in ranks2.run(train_two, row):
        assert_close(result, expected)


def set_scale(accelerator: Accelerator, scale: float) -> None:
    """One with which this small model has no overflow, where none is made on purpose."""
    scaler = accelerator.fabric.strategy.grad_scaler
    if scaler is not None:
        scaler.update(scale)


def train_overflowing(row: str) -> list[tuple[bool, float]]:
    """Whether each step was skipped, and the rate after it; the second loss is infinite on rank 0."""
    accelerator = Accelerator(strategy=row, mixed_precision="fp16", cpu=True)
    set_scale(accelerator, 64.0)
    net = Net(dtype=torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model, prepared, scheduler = accelerator.prepare(net, optimizer, scheduler)
    seen = []
    for step in range(3):
        loss = model(torch.ones(2, 5)).square().mean()
        if step == 1 and accelerator.is_main_process:
            loss = loss * torch.inf
        accelerator.backward(loss)
        prepared.step()
        scheduler.step()
        prepared.zero_grad()
        seen.append((accelerator.optimizer_step_was_skipped, scheduler.get_last_lr()[0]))
    return seen


@pytest.mark.parametrize("row", everyday(ROWS))
def test_a_skipped_step_skips_the_schedule(ranks2: Ranks, row: str) -> None:
    for seen in ranks2.run(train_overflowing, row):
        assert seen == [(False, 0.25), (True, 0.25), (False, 0.0625)]


def clip_scaled(row: str) -> tuple[float, float]:
    """Norms of the same gradient, with and without loss scaling."""
    norms = []
    for precision in ("no", "fp16"):
        accelerator = Accelerator(strategy=row, mixed_precision=precision, cpu=True)
        set_scale(accelerator, 64.0)
        net = Net(dtype=torch.float32)
        model, _ = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0))
        accelerator.backward(model(torch.ones(2, 5)).square().mean())
        norm = accelerator.clip_grad_norm_(model.parameters(), 1e9)
        assert norm is not None
        norms.append(norm.item())
        accelerator.free_memory()
    return norms[0], norms[1]


@pytest.mark.parametrize("row", everyday(ROWS))
def test_norms_are_unscaled(ranks2: Ranks, row: str) -> None:
    for plain_norm, scaled in ranks2.run(clip_scaled, row):
        assert scaled == pytest.approx(plain_norm, rel=1e-2)  # fp16 has 11 bits


def weigh(row: str) -> dict[str, Tensor]:
    """Losses that are means over 1 and 3 samples on the two ranks."""
    accelerator = Accelerator(strategy=row, gradient_accumulation_steps=2, cpu=True)
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x = torch.arange(20, dtype=torch.float64).view(4, 5) / 20
    mine = x[:1] if accelerator.is_main_process else x[1:]
    for _ in range(2):
        with accelerator.accumulate(model):
            lightning_accel.engine_of(net).set_loss_weight(len(mine))
            accelerator.backward(model(mine).square().mean())
            optimizer.step()
    return values(net)


@pytest.mark.parametrize("row", everyday(ROWS))
def test_losses_with_weights_are_not_divided(ranks2: Ranks, row: str) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.arange(20, dtype=torch.float64).view(4, 5) / 20).square().mean().backward()
    optimizer.step()
    for result in ranks2.run(weigh, row):
        assert_close(result, dict(net.named_parameters()))


def learning_rates(row: str, arguments: dict[str, Any]) -> list[float]:
    accelerator = Accelerator(strategy=row, gradient_accumulation_steps=2, cpu=True, **arguments)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loader: Any = DataLoader(range(10), batch_size=2 if accelerator.split_batches else 1)
    model, loader, optimizer, scheduler = accelerator.prepare(net, loader, optimizer, scheduler)
    rates = []
    for _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 5, dtype=torch.float64)).mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        rates.append(scheduler.get_last_lr()[0])
    return rates


RATES = [
    ({}, [1, 0.25, 0.25, 0.0625, 0.015625]),
    ({"split_batches": True}, [1, 0.5, 0.5, 0.25, 0.125]),
    ({"step_scheduler_with_optimizer": False}, [0.5, 0.25, 0.125, 0.0625, 0.03125]),
]


@pytest.mark.parametrize(("arguments", "expected"), RATES, ids=["whole", "split", "unconditional"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_learning_rates(ranks2: Ranks, row: str, arguments: dict[str, Any], expected: list[float]) -> None:
    """Of five micro-batches, two to a window, on two ranks: windows end with the second, the fourth and the fifth."""
    for rates in ranks2.run(learning_rates, row, arguments):
        assert rates == expected


def schedule_of_prepared(row: str) -> list[float]:
    """A schedule that was made from the optimizer that prepare has returned, and a compiled model."""
    accelerator = Accelerator(strategy=row, gradient_accumulation_steps=2, cpu=True)
    net = torch.compile(Net(), backend="eager")
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step))
    rates = []
    for _ in range(4):
        with accelerator.accumulate():
            accelerator.backward(model(torch.ones(1, 5, dtype=torch.float64)).mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        rates += scheduler.get_last_lr()
    return rates


@pytest.mark.parametrize("row", everyday(ROWS))
def test_a_schedule_made_after_prepare(ranks2: Ranks, row: str) -> None:
    assert ranks2.run(schedule_of_prepared, row) == [[1, 0.25, 0.25, 0.0625]] * 2


def train_uneven(row: str) -> tuple[dict[str, Tensor], int]:
    """Rank 0 has three batches, rank 1 two; the plain mean over those that are there."""
    accelerator = Accelerator(strategy=row, cpu=True, even_batches=False)
    net = Net()
    loader: Any = DataLoader(Samples(20), batch_size=4)
    model, optimizer, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loader)
    steps = 0
    with accelerator.join_uneven_inputs([model]):
        for _, x, y in loader:
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return values(net), steps


@pytest.mark.parametrize("row", everyday(ROWS))
def test_uneven_inputs(ranks2: Ranks, row: str) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    data = Samples(20)
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        nn.functional.mse_loss(net(data.x[start:stop]), data.y[start:stop]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for result, steps in ranks2.run(train_uneven, row):
        assert steps == 3
        assert_close(result, dict(net.named_parameters()))


def left_without_step(row: str, clear: bool) -> tuple[dict[str, Tensor], list[float]]:
    """Windows of two; the first is left without a step in its last micro-batch."""
    accelerator = Accelerator(strategy=row, split_batches=True, gradient_accumulation_steps=2, cpu=True)
    net = Net()
    optimizer = new_optimizer(net)
    scheduler: Any = ExponentialLR(optimizer, 0.5)
    model, optimizer, scheduler, loader = accelerator.prepare(net, optimizer, scheduler, batches_of(True))
    for number, (_, x, y) in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            if number != 1:
                optimizer.step()
            scheduler.step()  # of the first window: its optimizer has not stepped
            if clear or number not in (0, 1):
                optimizer.zero_grad()
    return values(net), scheduler.get_last_lr()


def plain_left(clear: bool) -> dict[str, Tensor]:
    net = Net()
    optimizer = new_optimizer(net)
    for _, x, y in list(batches_of(True, ranks=1))[2 if clear else 0 :]:
        (nn.functional.mse_loss(net(x), y) / 2).backward()
    optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_a_window_without_a_step_is_dropped_if_it_was_cleared(ranks2: Ranks, row: str, clear: bool) -> None:
    expected = plain_left(clear)
    for result, rate in ranks2.run(left_without_step, row, clear):
        assert_close(result, expected)
        assert rate == [pytest.approx(0.01)]


def overflow_in_one_of_two(row: str) -> list[float]:
    """How far each of two clipped models moves when the gradients of the first are infinite on rank 0."""
    accelerator = Accelerator(strategy=row, mixed_precision="fp16", cpu=True)
    set_scale(accelerator, 64.0)
    nets = [Net(dtype=torch.float32) for _ in range(2)]
    prepared = accelerator.prepare(*nets, *[torch.optim.SGD(net.parameters(), lr=1.0) for net in nets])
    before = [values(net) for net in nets]
    first, second = (model(torch.ones(2, 5)).square().mean() for model in prepared[:2])
    if accelerator.is_main_process:
        first = first * torch.inf
    accelerator.backward(first + second)
    accelerator.clip_grad_norm_([*nets[0].parameters(), *nets[1].parameters()], 1e-3)
    for optimizer in prepared[2:]:
        optimizer.step()
    return [
        max(float((value - old[name]).abs().max()) for name, value in values(net).items())
        for net, old in zip(nets, before, strict=True)
    ]


@pytest.mark.parametrize("row", everyday(ROWS))
def test_what_is_clipped_together_does_not_step_unclipped(ranks2: Ranks, row: str) -> None:
    for moved in ranks2.run(overflow_in_one_of_two, row):
        assert moved[0] == 0
        assert moved[1] <= 1e-3
