"""Models that start on the meta device."""

from __future__ import annotations

import gc
import re
from typing import ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from core.toys import ROW_NAMES, Net, Tanh, adamw, live_bytes, mse, my_share, relative_error, train_alone, values
from core.toys import data as toy_data
from lightning_accel.core import Engine
from lightning_accel.core.absent import AbsentParameter
from lightning_accel.core.parameter_memory import ParameterMemory
from rows import everyday

EXACT = 1e-12
"""Relative error in float64 that only rounding can make."""


class Zoo(nn.Module):
    """Layers of torch's own, each of which draws its values in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True) for _ in range(3))
        self.recurrent = nn.LSTM(8, 5, num_layers=2, batch_first=True)
        self.normalise = nn.BatchNorm1d(5)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.convolution = nn.Conv1d(5, 4, 3)


def on_meta(make):
    with torch.device("meta"):
        return make()


def seeded(make):
    torch.manual_seed(5)
    return make()


def started(row, make):
    torch.manual_seed(5 + 10 * dist.get_rank())  # rank 0's counts
    before = torch.get_rng_state()
    module = on_meta(make)
    for parameter in module.parameters():
        parameter.tag = "kept"
    held = list(module.parameters())
    engine = Engine(module, row)
    assert torch.equal(torch.get_rng_state(), before), "the rank's own random numbers go on as before"
    assert all(a is b for a, b in zip(held, module.parameters(), strict=True)), "parameters stay the same objects"
    assert {parameter.tag for parameter in held} == {"kept"}
    with engine.full_parameters():
        state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    requires = [parameter.requires_grad for parameter in module.parameters()]
    engine.close()
    return state, requires


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
@pytest.mark.parametrize("world", [1, 3], indirect=True)
def test_values_are_those_of_a_single_process(world, row):
    expected = seeded(Zoo)
    for state, requires in world.run(started, row, Zoo):
        assert state.keys() == expected.state_dict().keys()
        for name, value in expected.state_dict().items():
            assert torch.equal(state[name], value), name
        assert requires == [parameter.requires_grad for parameter in expected.parameters()]


def trained(row, make_optimizer):
    torch.manual_seed(5 + 10 * dist.get_rank())
    module = on_meta(lambda: Net().double())
    engine = Engine(module, row)
    optimizer = make_optimizer(module)
    engine.add_optimizer(optimizer)
    xs, ys = toy_data(20, dist.get_world_size())
    for x, y in zip(xs, ys, strict=True):
        optimizer.zero_grad()
        engine.backward(mse(module, my_share(x), my_share(y)))
        optimizer.step()
    alone = seeded(Net).double()
    train_alone(alone, make_optimizer(alone), 20, dist.get_world_size())
    return relative_error(values(engine), alone.parameters())


def whole_tensors(module):
    return torch.optim.Adafactor(module.parameters(), lr=0.01)


def elementwise(module):
    return adamw([{"params": module.blocks.parameters()}, {"params": [*module.first.parameters()], "lr": 0.02}])


@pytest.mark.parametrize("make_optimizer", [elementwise, whole_tensors])
@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_training_goes_on_as_from_any_start(ranks2, row, make_optimizer):
    # fp32 draws, made double: the single process draws in fp32 and is made double, too; on meta all is double at once.
    torch.set_default_dtype(torch.float32)
    assert max(ranks2.run(trained_in_double, row, make_optimizer)) < EXACT


def trained_in_double(row, make_optimizer):
    torch.set_default_dtype(torch.float64)
    try:
        return trained(row, make_optimizer)
    finally:
        torch.set_default_dtype(torch.float32)


class Watched(ParameterMemory):
    """Notes the memory of all tensors whenever a unit's is at its largest."""

    seen: ClassVar[list[int]] = []

    def open(self):
        super().open()
        self.seen.append(live_bytes())

    def free(self):
        self.seen.append(live_bytes())
        super().free()

    def release(self, *, abandon):
        super().release(abandon=abandon)
        self.seen.append(live_bytes())


class Wide(nn.Module):
    """24 blocks of 4 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Tanh(1024) for _ in range(24))


def peak_of_start(make_optimizer):
    small = on_meta(Net)
    warm = Engine(small, "fsdp")  # what is imported and paged in on first use is not the model's
    warm.add_optimizer(make_optimizer(small.parameters()))
    warm.close()
    module = on_meta(Wide)
    dist.barrier()
    gc.collect()
    before = live_bytes()
    Watched.seen.clear()
    with mock.patch("lightning_accel.core.unit.ParameterMemory", Watched):
        engine = Engine(module, "fsdp", bucket_cap_mb=1)
        engine.add_optimizer(make_optimizer(module.parameters()))
        engine.build()
    assert len(Watched.seen) >= 48
    peak = max(Watched.seen) - before
    away = all(isinstance(parameter, AbsentParameter) for parameter in module.parameters())
    gathered = engine.report().gathered
    dist.barrier()
    engine.close()
    return peak, gathered, away


def muon_like(parameters):
    return torch.optim.Adafactor(parameters)


@pytest.mark.parametrize("make_optimizer", [adamw, muon_like], ids=["elementwise", "whole tensors"])
def test_no_rank_ever_has_more_than_its_part_and_two_units(ranks2, make_optimizer):
    unit = (1024 * 1024 + 1024) * 4
    model = 24 * unit
    for peak, gathered, away in ranks2.run(peak_of_start, make_optimizer):
        assert away
        assert gathered <= 2 * unit
        # Whole tensors divide a unit anew: whole parameters, a buffer, and the old part and the new one for a moment.
        # Small things: random states, and what tells which values are missing.
        units = 2 if make_optimizer is adamw else 3
        assert model / 2 < peak < model / 2 + units * unit + 2**16, f"{peak / 2**20:.1f} MiB"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(Tanh(4) for _ in range(2))
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embedding.weight


def test_tied_parameters_stay_tied_and_have_the_values_of_the_first(ranks2):
    expected = seeded(Tied.__mro__[0]).state_dict()
    torch.manual_seed(5)
    embedding = nn.Embedding(6, 4).weight
    for state, _ in ranks2.run(started, "fsdp", Tied):
        assert torch.equal(state["embedding.weight"], embedding)
        assert torch.equal(state["head.weight"], embedding)
        assert state.keys() == expected.keys()


class Block(nn.Module):
    """Sets its children's parameters in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.linear.weight, std=0.02)


def blocks():
    return nn.Sequential(*(Block() for _ in range(3)))


def transformer():
    return nn.Transformer(8, 2, 2, 2, 12)


@pytest.mark.parametrize(("row", "make"), [("fsdp", blocks), ("zero2", blocks)])
def test_modules_that_set_their_childrens_parameters(ranks2, row, make):
    expected = seeded(make).state_dict()
    for state, _ in ranks2.run(started, row, make):
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def whole_transformer():
    Engine(on_meta(transformer), "fsdp")


def hooked(row):
    module = on_meta(Net)
    calls = []
    module.first.weight.register_hook(lambda g: calls.append("hook") or g * 2)
    module.last.bias.register_post_accumulate_grad_hook(lambda _: calls.append("post"))
    engine = Engine(module, row)
    engine.add_optimizer(adamw(module.parameters()))
    x, y = toy_data(1, dist.get_world_size(), torch.float32)
    engine.backward(mse(module, my_share(x[0]), my_share(y[0])))
    return sorted(calls)


@pytest.mark.parametrize("row", ["ddp", "fsdp"])
def test_hooks_on_parameters_stay(ranks2, row):
    assert ranks2.run(hooked, row) == [["hook", "post"]] * 2


class Scale(nn.Module):
    """Has no reset_parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.arange(3))


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.scale = Scale()


def initialised(init):
    module = on_meta(Partly)
    with torch.device("cpu"):
        module.body = nn.Linear(3, 3)  # a part that has values keeps them
    nn.init.constant_(module.body.weight, 0.25)
    engine = Engine(module, "fsdp", param_init_fn=init)
    with engine.full_parameters():
        state = {name: value.clone() for name, value in module.state_dict().items()}
    engine.close()
    return state


def by_hand(part):
    assert isinstance(part, Scale)
    part.gain.data.fill_(2.5)
    part.table.copy_(torch.tensor([7, 8, 9]))


def test_an_init_function_and_parts_that_have_values(ranks2):
    for state in ranks2.run(initialised, by_hand):
        assert state["scale.gain"].tolist() == [2.5] * 3
        assert state["scale.table"].tolist() == [7, 8, 9]
        assert set(state["body.weight"].flatten().tolist()) == {0.25}


def forgetful(part):
    part.gain.fill_(1.0)


def replacing(part):
    part.to_empty(device="cpu")
    part.gain = nn.Parameter(torch.ones(3))


def without_init():
    Engine(on_meta(Partly), "zero2")


def with_init(init):
    initialised(init)


def meta_on_one_rank():
    Engine(on_meta(Net) if dist.get_rank() else Net(), "fsdp")


@pytest.mark.parametrize(
    ("mistake", "arguments", "message"),
    [
        (without_init, (), r"these have none: scale \(Scale: gain, table\). Add the method, or give param_init_fn"),
        (with_init, (forgetful,), r"of scale \(Scale\) to be set by param_init_fn, but 'table' still had no values"),
        (with_init, (replacing,), r"of scale \(Scale\) to be set in place, but 'gain' was replaced"),
        (whole_transformer, (), r"Expected the model itself \(Transformer\) to set parameters within one unit only"),
        (meta_on_one_rank, (), r"rank 1 has parameter 'first.weight': .*, without values"),
    ],
)
def test_mistakes_have_clear_errors(ranks2, mistake, arguments, message):
    for error in ranks2.run_expecting_error(mistake, *arguments):
        assert error is not None
        assert error[0] == "ValueError"
        assert re.search(message, error[1]), error[1]
