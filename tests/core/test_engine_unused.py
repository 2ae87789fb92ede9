"""Parameters without a gradient: unused by some ranks or by all, frozen, and thawed."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from core.toys import (
    EXACT,
    ROW_NAMES,
    Net,
    adamw,
    build,
    data,
    mse,
    my_share,
    prepared,
    relative_error,
    sgd,
    started,
    values,
)
from lightning_accel.core import ROWS, Engine
from lightning_accel.core.layout import ALIGNMENT
from lightning_accel.core.parameter_memory import Presence
from rows import everyday

# ---------------------------------------------------------------------- unused


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.left = nn.Linear(13, 3)
        self.right = nn.Linear(13, 3)
        self.never = nn.Linear(13, 3)

    def forward(self, x, branch="left"):
        return getattr(self, branch)(torch.tanh(self.first(x)))


def branches(row, chosen, cap):
    """Each rank takes the branch that ``chosen`` gives it for a step; the single process takes each for its samples."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    alone, (xs, ys) = build(Branches), data(len(chosen), ranks)
    reference = adamw(alone.parameters())
    engine, optimizer = started(row, Branches, bucket_cap_mb=cap)
    names = [name.split(".")[0] for name, _ in engine.module.named_parameters()]
    before = values(engine)
    for x, y, step in zip(xs, ys, chosen, strict=True):
        reference.zero_grad()
        losses = [((alone(x[r::ranks], step[r]) - y[r::ranks]) ** 2).mean() for r in range(ranks)]
        (sum(losses) / ranks).backward()
        reference.step()
        optimizer.zero_grad()
        engine.backward(((engine.module(my_share(x), step[rank]) - my_share(y)) ** 2).mean())
        for name, parameter in engine.module.named_parameters():
            used = name.split(".")[0] in ("first", *step)
            assert (parameter.grad is not None) == used, name
        optimizer.step()
    kept = [torch.equal(a, b) for a, b, name in zip(before, values(engine), names, strict=True) if name == "never"]
    assert kept
    assert all(kept)
    state = optimizer.state_dict()["state"] if row == "ddp" or rank == 0 else optimizer.state_dict()
    if rank == 0:
        expected = reference.state_dict()["state"]
        assert {k: v["step"] for k, v in state.items()} == {k: v["step"] for k, v in expected.items()}
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
@pytest.mark.parametrize("cap", [0.0005, 25])
def test_unused_parameters_are_left_alone_and_partly_used_ones_averaged(ranks2, row, cap):
    chosen = [("left", "left"), ("left", "right"), ("right", "right"), ("right", "left"), ("left", "left")]
    assert max(ranks2.run(branches, row, chosen, cap)) < EXACT


def backward_without_any_gradient(row):
    """A loss that depends on no parameter on one rank: it must not leave the other one waiting."""
    engine, optimizer = started(row)
    x, y = data(1, dist.get_world_size())
    loss = mse(engine.module, my_share(x[0]), my_share(y[0]))
    if dist.get_rank() == 1:
        loss = torch.zeros((), requires_grad=True) * 1.0
    engine.backward(loss)
    optimizer.step()
    return values(engine)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_a_rank_whose_loss_uses_no_parameter(ranks2, row):
    ours, theirs = ranks2.run(backward_without_any_gradient, row)
    assert relative_error(ours, theirs) == 0


class Sum(torch.autograd.Function):
    """A collective of the model's own, as synchronised BatchNorm has."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class Skipping(Net):
    def forward(self, x, skip):
        x = Sum.apply(torch.tanh(self.first(x)))
        for block in self.blocks[: -1 if skip else None]:
            x = block(x)
        return self.last(x)


def collectives_of_the_model(row):
    engine, optimizer = prepared(row, lambda: Skipping(13, 6), bucket_cap_mb=0.0001)
    xs, _ = data(3, dist.get_world_size())
    for step, x in enumerate(xs):  # in the end one rank leaves the block out whose gradients come first
        engine.backward(engine.module(my_share(x), skip=step == 2 and dist.get_rank() == 1).sum())
        optimizer.step()
    return values(engine)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_a_model_with_collectives_of_its_own_that_is_used_unevenly(ranks2, row):
    ours, theirs = ranks2.run(collectives_of_the_model, row)
    assert relative_error(ours, theirs) == 0


# ---------------------------------------------------------------------- frozen and thawed


def features(row):
    """Frozen blocks whose outputs need no gradient: nothing of them is needed after their forward."""
    module = build(Net)
    module.requires_grad_(False)
    module.last.requires_grad_(True)
    engine = Engine(module, row)
    optimizer = sgd(module.last.parameters())
    engine.add_optimizer(optimizer)
    x, y = (tensor[0] for tensor in data(1, dist.get_world_size()))
    loss = mse(module, my_share(x), my_share(y))
    here = [unit.name for unit in engine.units if unit.block is not None and unit.memory.presence is Presence.HERE]
    engine.backward(loss)
    optimizer.step()
    return here, engine.report().at_rest["gradients"]


def test_frozen_blocks_are_freed_after_forward_and_have_no_gradients(ranks2):
    for here, gradients in ranks2.run(features, "fsdp"):
        assert here == []
        assert gradients == 2 * ALIGNMENT * 8  # half of the last layer's 42 numbers, padded


def progressive_freezing(row):
    ranks = dist.get_world_size()
    alone, (xs, ys) = build(Net), data(6, ranks)
    reference = adamw(alone.parameters())
    engine, optimizer = started(row, bucket_cap_mb=0.0005)
    for i in range(6):
        if i == 2:
            alone.blocks[2].requires_grad_(False)
            engine.module.blocks[2].requires_grad_(False)
            alone.blocks[1].linear.bias.requires_grad_(False)
            engine.module.blocks[1].linear.bias.requires_grad_(False)
        reference.zero_grad()
        optimizer.zero_grad()
        mse(alone, xs[i], ys[i]).backward()
        engine.before_forward()
        engine.backward(mse(engine.module, my_share(xs[i]), my_share(ys[i])))
        reference.step()
        optimizer.step()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_parameters_that_are_frozen_on_the_way(ranks2, row):
    assert max(ranks2.run(progressive_freezing, row)) < EXACT


def thawing(row, make_optimizer):
    ranks = dist.get_world_size()
    alone, module, (xs, ys) = build(Net), build(Net), data(6, ranks)
    for model in (alone, module):
        model.blocks.requires_grad_(False)
    reference = make_optimizer([p for p in alone.parameters() if p.requires_grad])
    engine = Engine(module, row, bucket_cap_mb=0.0005)
    optimizer = make_optimizer([p for p in module.parameters() if p.requires_grad])
    engine.add_optimizer(optimizer)
    engine.build()
    frozen = engine.report().at_rest["frozen_parameters"]
    for i in range(6):
        if i == 3:
            for model, made in ((alone, reference), (module, optimizer)):
                model.blocks.requires_grad_(True)
                made.add_param_group({"params": model.blocks.parameters(), "lr": 0.005})
        reference.zero_grad()
        optimizer.zero_grad()
        mse(alone, xs[i], ys[i]).backward()
        engine.before_forward()
        engine.backward(mse(engine.module, my_share(xs[i]), my_share(ys[i])))
        reference.step()
        optimizer.step()
    return relative_error(values(engine), alone.parameters()), frozen, engine.report().at_rest["frozen_parameters"]


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
@pytest.mark.parametrize("make_optimizer", [adamw, torch.optim.Adafactor])
def test_parameters_that_are_thawed_into_a_new_group(ranks2, row, make_optimizer):
    for error, before, after in ranks2.run(thawing, row, make_optimizer):
        assert error < EXACT
        fraction = ROWS[row].parameters.fraction(2)
        assert 0 <= before - 3 * (13 * 13 + 13) * 8 * fraction < 3 * ALIGNMENT * 8
        assert after == 0


def thawed_without_notice(row):
    module = build(Net)
    module.last.requires_grad_(False)
    engine = Engine(module, row)
    optimizer = sgd(module.parameters())
    engine.add_optimizer(optimizer)
    x, y = (tensor[0] for tensor in data(1, dist.get_world_size()))
    start = build(Net).last.weight
    for step in range(2):
        optimizer.zero_grad()
        if step == 1:
            module.last.requires_grad_(True)
        engine.backward(mse(module, my_share(x), my_share(y)))
        optimizer.step()
    with engine.full_parameters():
        return module.last.weight.detach().clone(), not torch.equal(module.last.weight.detach(), start.detach())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_thawing_is_noticed_in_a_plain_loop(ranks2, row):
    (ours, moved), (theirs, _) = ranks2.run(thawed_without_notice, row)
    assert moved
    assert torch.equal(ours, theirs)
