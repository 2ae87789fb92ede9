"""Gradients under the engine: how they arrive, how they add up, and what ``parameter.grad`` shows."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.toys import (
    EXACT,
    ROW_NAMES,
    Net,
    build,
    compare,
    data,
    mse,
    my_share,
    prepared,
    relative_error,
    sgd,
    started,
    train,
    values,
)
from lightning_accel.core.placeholder import ShardedGradient
from lightning_accel.core.unit import Content
from rows import everyday

# ---------------------------------------------------------------------- how they arrive


def reentrant(module, x, y):
    x = torch.tanh(module.first(x)).requires_grad_()
    for _ in range(2):  # each block's gradient arrives in two parts
        for block in module.blocks:
            x = checkpoint(block, x, use_reentrant=True)
    return ((module.last(x) - y) ** 2).mean()


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_that_arrive_in_parts(ranks2, row, accumulate):
    assert max(ranks2.run(compare, Net, row, loss=reentrant, accumulate=accumulate, bucket_cap_mb=0.0005)) < EXACT


def late_rounds(row):
    engine, optimizer = started(row, bucket_cap_mb=0.0005)
    counts = []
    for _ in range(3):
        train(engine, optimizer, 1, loss=reentrant)
        kind = "all_reduce" if row == "ddp" else "reduce_scatter"
        counts.append(engine.report().collectives[kind])
    return len(engine.units), counts


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_late_gradients_cost_an_extra_reduction_once(ranks2, row):
    for units, (first, second, third) in ranks2.run(late_rounds, row):
        assert first > units
        assert second == third == units


def backward_twice_in_one_context(row):
    engine, optimizer = prepared(row, Net, sgd, bucket_cap_mb=0.0005)
    alone = build(Net)
    reference = sgd(alone.parameters())
    xs, ys = data(4, dist.get_world_size())
    for x, y in zip(xs, ys, strict=True):
        reference.zero_grad()
        optimizer.zero_grad()
        (2 * mse(alone, x, y)).backward()
        with engine.forward_context():
            losses = [mse(engine.module, my_share(x), my_share(y)) for _ in range(2)]
        with engine.backward_context():
            for loss in losses:
                loss.backward()
        reference.step()
        optimizer.step()
    assert len(set(engine.units)) == len(engine.units)
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", ["ddp", "zero2", "fsdp"])
def test_two_backwards_in_one_context(ranks2, row):
    assert max(ranks2.run(backward_twice_in_one_context, row)) < EXACT


def gradient_penalty(row):
    """The gradient of the output to the input is part of the loss: backward within forward, and of it once more."""

    def loss(module, x, y):
        x = x.clone().requires_grad_()
        out = module(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return ((out - y) ** 2).mean() + (slope**2).mean()

    engine, optimizer = prepared(row, Net, sgd)
    alone = build(Net)
    reference = sgd(alone.parameters())
    xs, ys = data(3, dist.get_world_size())
    for x, y in zip(xs, ys, strict=True):
        reference.zero_grad()
        optimizer.zero_grad()
        loss(alone, x, y).backward()
        with engine.forward_context():
            value = loss(engine.module, my_share(x), my_share(y))
        engine.backward(value)
        reference.step()
        optimizer.step()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_gradients_within_the_loss(ranks2, row):
    assert max(ranks2.run(gradient_penalty, row)) < EXACT


def with_a_graph_of_its_own(row):
    """Backward itself can be differentiated; what the engine adds up cannot."""
    engine, optimizer = prepared(row, Net, sgd)
    alone = build(Net)
    reference = sgd(alone.parameters())
    xs, ys = data(3, dist.get_world_size())
    for x, y in zip(xs, ys, strict=True):
        reference.zero_grad()
        optimizer.zero_grad()
        mse(alone, x, y).backward()
        with engine.forward_context():
            loss = mse(engine.module, my_share(x), my_share(y))
        engine.backward(loss, create_graph=True)
        assert not any(unit.rest.requires_grad for unit in engine.units)
        reference.step()
        optimizer.step()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_backward_with_a_graph(ranks2, row):
    assert max(ranks2.run(with_a_graph_of_its_own, row)) < EXACT


def penalty(where):
    """A term of the loss that is made from the parameters themselves."""
    engine, optimizer = prepared("fsdp", Net, sgd)
    alone = build(Net)
    reference = sgd(alone.parameters())
    x, y = (tensor[0] for tensor in data(1, dist.get_world_size()))
    (mse(alone, x, y) + sum((p**2).sum() for p in alone.parameters())).backward()
    reference.step()
    if where == "forward":
        with engine.forward_context():
            loss = mse(engine.module, my_share(x), my_share(y))
            with engine.full_parameters():
                loss = loss + sum((p**2).sum() for p in engine.module.parameters())
        engine.backward(loss)
        optimizer.step()
        return relative_error(values(engine), alone.parameters())
    with engine.full_parameters():
        loss = sum((p**2).sum() for p in engine.module.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.backward(loss)
    return 0.0


@pytest.mark.parametrize("where", ["forward", "outside"])
def test_a_loss_of_whole_parameters(ranks2, where):
    assert max(ranks2.run(penalty, where)) < EXACT


def old_graph(row):
    engine, optimizer = prepared(row)
    x, y = (tensor[0] for tensor in data(1, dist.get_world_size()))
    with engine.forward_context():
        first, second = mse(engine.module, x, y), mse(engine.module, x, y)
    engine.backward(first)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.backward(second)
    return True


@pytest.mark.parametrize("row", ["ddp", "zero1", "zero2"])
def test_a_graph_from_before_the_step_is_refused(ranks2, row):
    assert all(ranks2.run(old_graph, row))


# ---------------------------------------------------------------------- how they add up


def twice_backward(row, zero_between):
    """Two backwards before one step, both reduced."""
    ranks = dist.get_world_size()
    alone, (xs, ys) = build(Net), data(8, ranks)
    reference = sgd(alone.parameters())
    engine, optimizer = started(row, optimizer=sgd, bucket_cap_mb=0.0005)
    for i in range(0, 8, 2):
        reference.zero_grad()
        optimizer.zero_grad()
        for j in (i, i + 1):
            if zero_between and j > i:
                reference.zero_grad(set_to_none=False)
                optimizer.zero_grad(set_to_none=False)
            mse(alone, xs[j], ys[j]).backward()
            engine.backward(mse(engine.module, my_share(xs[j]), my_share(ys[j])))
        reference.step()
        optimizer.step()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
@pytest.mark.parametrize("zero_between", [False, True])
def test_several_reducing_backwards_add_up(ranks3, row, zero_between):
    assert max(ranks3.run(twice_backward, row, zero_between)) < EXACT


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x, side):
        return getattr(self, side)(x)


def losses_one_after_the_other(row):
    engine, optimizer = prepared(row, Heads, sgd)
    alone = build(Heads)
    reference = sgd(alone.parameters())
    x, y = (tensor[0] for tensor in data(1, dist.get_world_size()))
    for _ in range(3):
        for side in ("left", "right", "left"):
            ((alone(x, side) - y) ** 2).mean().backward()
            engine.backward(((engine.module(my_share(x), side) - my_share(y)) ** 2).mean())
        for made in (reference, optimizer):
            made.step()
            made.zero_grad()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_several_backwards_each_through_a_part_of_the_model(ranks2, row):
    assert max(ranks2.run(losses_one_after_the_other, row)) < EXACT


def without_zero_grad(row):
    """torch's semantics: gradients that are not zeroed add up across steps."""
    ranks = dist.get_world_size()
    alone, (xs, ys) = build(Net), data(3, ranks)
    reference = torch.optim.SGD(alone.parameters(), 0.01)
    engine, optimizer = started(row, optimizer=lambda p: torch.optim.SGD(p, 0.01))
    for x, y in zip(xs, ys, strict=True):
        mse(alone, x, y).backward()
        reference.step()
        engine.backward(mse(engine.module, my_share(x), my_share(y)))
        optimizer.step()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_gradients_that_are_not_zeroed_stay(ranks2, row):
    assert max(ranks2.run(without_zero_grad, row)) < EXACT


def no_sync_twice_then_sync(row):
    """zero1's reduced gradients must survive local accumulation on top of them."""
    ranks = dist.get_world_size()
    alone, (xs, ys) = build(Net), data(4, ranks)
    engine, optimizer = started(row, optimizer=sgd, bucket_cap_mb=0.0005)
    reference = sgd(alone.parameters())
    for i, synchronise in enumerate((True, False, False, True)):
        mse(alone, xs[i], ys[i]).backward()
        with contextlib.nullcontext() if synchronise else engine.no_sync():
            engine.backward(mse(engine.module, my_share(xs[i]), my_share(ys[i])))
    reference.step()
    optimizer.step()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_local_gradients_on_top_of_reduced_ones(ranks3, row):
    assert max(ranks3.run(no_sync_twice_then_sync, row)) < EXACT


def zeroed_between_accumulations(row):
    engine, optimizer = prepared(row, Net, sgd)
    x, y = (tensor[0] for tensor in data(1, dist.get_world_size()))
    engine.backward(mse(engine.module, my_share(x), my_share(y)))
    with engine.no_sync():
        engine.backward(mse(engine.module, my_share(x), my_share(y)))
    optimizer.zero_grad(set_to_none=False)
    engine.backward(0 * mse(engine.module, my_share(x), my_share(y)))
    return float(engine.grad_norm(optimizer))


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_zeroing_after_reduced_and_local_gradients(ranks2, row):
    assert ranks2.run(zeroed_between_accumulations, row) == [0.0, 0.0]


def contents(row):
    engine, optimizer = started(row)
    train(engine, optimizer, 1)
    return [content for unit in engine.units for content in unit.content]


def test_after_a_step_gradients_stay_until_they_are_zeroed(ranks2):
    for found in ranks2.run(contents, "zero2"):
        assert set(found) == {Content.REDUCED}


# ---------------------------------------------------------------------- what parameters show


def shown(row):
    engine, optimizer = started(row)
    x, y = data(2, dist.get_world_size())
    weight = engine.module.first.weight
    with engine.no_sync():
        engine.backward(mse(engine.module, my_share(x[0]), my_share(y[0])))
    local = type(weight.grad)
    engine.backward(mse(engine.module, my_share(x[1]), my_share(y[1])))
    reduced = type(weight.grad)
    full = engine.full_gradient(weight)
    alone = build(Net)
    for i in range(2):
        mse(alone, x[i], y[i]).backward()
    return local, reduced, float((full - alone.first.weight.grad).abs().max())


def test_gradients_show_as_tensors_or_as_placeholders(ranks2):
    for row, local, reduced in [
        ("ddp", torch.Tensor, torch.Tensor),
        ("zero1", torch.Tensor, ShardedGradient),
        ("zero2", ShardedGradient, ShardedGradient),
    ]:
        for found in ranks2.run(shown, row):
            assert found[:2] == (local, reduced)
            assert found[2] < EXACT


def assigned_by_hand(row):
    engine, optimizer = started(row, optimizer=lambda p: torch.optim.SGD(p, 1.0))
    with engine.full_parameters(engine.module.last):
        before = engine.module.last.weight.detach().clone()
    engine.module.last.weight.grad = torch.full_like(before, 0.5)
    optimizer.step()
    others = [p.grad for p in engine.module.first.parameters()]
    with engine.full_parameters(engine.module.last):
        return float((before - engine.module.last.weight - 0.5).abs().max()), others


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_gradients_may_be_assigned_by_hand(ranks2, row):
    for error, others in ranks2.run(assigned_by_hand, row):
        assert error < EXACT
        assert others == [None, None]


def assigned_and_clipped(row):
    engine, optimizer = prepared(row, optimizer=sgd)
    alone = build(Net)
    reference = sgd(alone.parameters())
    xs, ys = data(1, dist.get_world_size())
    engine.backward(mse(engine.module, my_share(xs[0]), my_share(ys[0])))
    mse(alone, xs[0], ys[0]).backward()
    for net in (engine.module, alone):
        net.first.weight.grad = torch.full((13, 7), 2.0, dtype=torch.float64)
    engine.clip_grad_norm_(optimizer, 0.5)
    torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
    optimizer.step()
    reference.step()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_a_gradient_that_was_assigned_is_stepped_with_as_it_was_clipped(ranks2, row):
    assert max(ranks2.run(assigned_and_clipped, row)) < EXACT


def set_to_none_by_hand(row):
    engine, optimizer = started(row, optimizer=sgd)
    train(engine, optimizer, 1)
    before = values(engine)
    for parameter in engine.module.parameters():
        parameter.grad = None
    optimizer.step()
    return all(torch.equal(a, b) for a, b in zip(before, values(engine), strict=True))


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_a_gradient_set_to_none_is_not_stepped_with(ranks2, row):
    assert all(ranks2.run(set_to_none_by_hand, row))


def norms(row):
    engine, optimizer = prepared(row, lambda: nn.Linear(7, 3, bias=False))  # 21 numbers: the third rank has none
    x, y = (tensor[0] for tensor in data(1, dist.get_world_size()))
    engine.backward(mse(engine.module, my_share(x), my_share(y)))
    unit = engine.units[0]
    norm = engine.grad_norm(optimizer)
    if dist.get_rank() == 1 or row == "ddp":
        unit.rest.fill_(torch.nan)
    return norm, bool(engine.grad_norm(optimizer, torch.inf).isnan())


@pytest.mark.parametrize("row", ["ddp", "zero2"])
def test_norms_are_the_same_on_every_rank_and_keep_nan(ranks3, row):
    found = ranks3.run(norms, row)
    assert {(norm.item(), norm.dtype) for norm, _ in found} == {(found[0][0].item(), torch.float64)}
    assert all(is_nan for _, is_nan in found)
