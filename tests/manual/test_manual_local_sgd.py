"""Local SGD equals ranks that train by themselves and average, in one process."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import Net, Samples, assert_close, values
from torch import Tensor, nn

from harness import Ranks
from lightning_accel import Accelerator, LocalSGD

EVERY, STEPS = 2, 5


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    data = Samples()
    start = 4 * step + 2 * rank
    return data.x[start : start + 2], data.y[start : start + 2]


def new_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def train() -> dict[str, Tensor]:
    accelerator = Accelerator(cpu=True)
    net = Net()
    model, optimizer = accelerator.prepare(net, new_optimizer(net))

    def step(number: int) -> None:
        x, y = batch_of(number, accelerator.process_index)
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    with LocalSGD(accelerator, model, local_sgd_steps=EVERY) as local_sgd:
        for number in range(1, 1 + STEPS):
            step(number)
            local_sgd.step()
    step(1 + STEPS)
    return values(net)


def expected() -> dict[str, Tensor]:
    nets = [Net()]
    optimizers = [new_optimizer(nets[0])]

    def together(number: int) -> None:
        """One step of all ranks' gradients, on the first net."""
        for rank in range(2):
            x, y = batch_of(number, rank)
            (nn.functional.mse_loss(nets[0](x), y) / 2).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    def average() -> None:
        with torch.no_grad():
            for first, second in zip(*(net.parameters() for net in nets), strict=True):
                mean = (first + second) / 2
                first.copy_(mean)
                second.copy_(mean)

    together(0)
    nets.append(copy.deepcopy(nets[0]))
    optimizers.append(new_optimizer(nets[1]))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for number in range(1, 1 + STEPS):
        for rank in range(2):
            x, y = batch_of(number, rank)
            nn.functional.mse_loss(nets[rank](x), y).backward()
            optimizers[rank].step()
            optimizers[rank].zero_grad()
        if number % EVERY == 0:
            average()
    average()
    for first, second in zip(*(net.parameters() for net in nets), strict=True):
        state = optimizers[0].state[first]
        state["momentum_buffer"].add_(optimizers[1].state[second]["momentum_buffer"]).div_(2)
    together(1 + STEPS)
    return {name: parameter.detach().clone() for name, parameter in nets[0].named_parameters()}


def test_local_sgd_equals_averaging_by_hand(ranks2: Ranks) -> None:
    result, other = ranks2.run(train)
    assert_close(result, expected())
    for name, value in result.items():
        assert torch.equal(other[name], value)


def refused() -> list[str]:
    messages = []
    for arguments, steps in (({"strategy": "zero2"}, 2), ({"mixed_precision": "fp16"}, 2), ({}, 0)):
        accelerator = Accelerator(cpu=True, **arguments)  # type: ignore[arg-type]
        model = accelerator.prepare(Net())
        try:
            LocalSGD(accelerator, model, local_sgd_steps=steps)
        except ValueError as error:
            messages.append(str(error))
        with LocalSGD(accelerator, model, local_sgd_steps=1, enabled=False) as local_sgd:
            local_sgd.step()
    return messages


@pytest.mark.parametrize("world", [1], indirect=True)
def test_refused(world: Ranks) -> None:
    (messages,) = world.run(refused)
    first, second, third = messages
    assert "got 'zero2'" in first
    assert "bf16" in second
    assert "local_sgd_steps of 1 or more, got 0" in third


class Halves(nn.Module):
    """Each rank has gradients for one of two layers only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        found: Tensor = self.layers[layer](x) * self.scale
        return found


def with_state_on_some_ranks(path: str) -> tuple[str, list[dict[str, Tensor]]]:
    accelerator = Accelerator(cpu=True)
    net = Halves()
    model, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters()))
    said = ""
    with LocalSGD(accelerator, model, local_sgd_steps=4) as local_sgd:
        for _ in range(1 + accelerator.process_index):
            accelerator.backward(model(torch.ones(2, 3), accelerator.process_index).sum())
            optimizer.step()
            optimizer.zero_grad()
        local_sgd.step()
        try:
            accelerator.save_state(path)
        except RuntimeError as error:
            said = str(error)
    state = optimizer.state_dict()["state"]
    return said, [state[index] for index in sorted(state)]


def test_state_on_some_ranks_only(ranks2: Ranks, tmp_path: Path) -> None:
    """Adam's state is then that of the rank which has it; of what both have, the mean and the later step."""
    (said, first), (_, second) = ranks2.run(with_state_on_some_ranks, str(tmp_path / "state"))
    assert "Expected save_state outside of a LocalSGD block" in said
    assert len(first) == 5
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    assert [float(state["step"]) for state in first] == [2, 1, 1, 2, 2]


def with_state_of_other_shapes() -> list[Tensor]:
    accelerator = Accelerator(cpu=True)
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.Adafactor(net.parameters(), lr=0.01))
    with LocalSGD(accelerator, model, local_sgd_steps=1) as local_sgd:
        x, y = batch_of(0, accelerator.process_index)
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        local_sgd.step()
    state = optimizer.state_dict()["state"]
    return [value for index in sorted(state) for _, value in sorted(state[index].items())]


def test_state_that_is_not_of_the_parameter_shape(ranks2: Ranks) -> None:
    """Adafactor keeps rows and columns: ranks that kept different ones would not stay the same."""
    first, second = ranks2.run(with_state_of_other_shapes)
    assert {value.dim() for value in first} > {0, 1}
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
