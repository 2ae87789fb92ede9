"""What users do around the engine: unusual orders of calls, and things that change between steps."""

import copy
import gc
import threading
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.toys import ROW_NAMES, Net, adamw, build, data, mse, my_share, relative_error, sgd, train, values
from lightning_accel.core import Engine
from lightning_accel.core.collectives import TorchCollectives
from lightning_accel.core.layout import ALIGNMENT
from lightning_accel.core.neighbours import Neighbours
from lightning_accel.core.parameter_memory import Presence
from rows import everyday

EXACT = 1e-12  # as in test_engine.py


def started(row, make=Net, optimizer=adamw, **options):
    module = build(make)
    engine = Engine(module, row, **options)
    made = optimizer(module.parameters())
    engine.add_optimizer(made)
    return engine, made


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x, side):
        return getattr(self, side)(x)


def losses_one_after_the_other(row):
    engine, optimizer = started(row, Heads, sgd)
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


def backward_twice_in_one_context(row):
    engine, optimizer = started(row, Net, sgd, bucket_cap_mb=0.0005)
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


def on_generic_collectives(row):
    def connect(device, group=None):
        return TorchCollectives(device, group, group)

    with mock.patch("lightning_accel.core.agreement.connect", connect):
        engine, optimizer = started(row, bucket_cap_mb=0.001)
    assert type(engine.mesh.shard) is TorchCollectives
    train(engine, optimizer, 3)
    alone = build(Net)
    reference = adamw(alone.parameters())
    xs, ys = data(3, dist.get_world_size())
    for x, y in zip(xs, ys, strict=True):
        reference.zero_grad()
        mse(alone, x, y).backward()
        reference.step()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_the_generic_collectives_do_with_units_of_different_sizes(ranks2, row):
    assert max(ranks2.run(on_generic_collectives, row)) < EXACT


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
    engine, optimizer = started(row, lambda: Skipping(13, 6), bucket_cap_mb=0.0001)
    xs, _ = data(3, dist.get_world_size())
    for step, x in enumerate(xs):  # in the end one rank leaves the block out whose gradients come first
        engine.backward(engine.module(my_share(x), skip=step == 2 and dist.get_rank() == 1).sum())
        optimizer.step()
    return values(engine)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_a_model_with_collectives_of_its_own_that_is_used_unevenly(ranks2, row):
    ours, theirs = ranks2.run(collectives_of_the_model, row)
    assert relative_error(ours, theirs) == 0


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


def zeroed_between_accumulations(row):
    engine, optimizer = started(row, Net, sgd)
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


def old_graph(row):
    engine, optimizer = started(row)
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


def evaluated_first(row):
    engine, optimizer = started(row)
    x, y = (tensor[0] for tensor in data(1, dist.get_world_size()))
    with torch.inference_mode(), engine.forward_context():
        engine.module(x)
    train(engine, optimizer, 2)
    return True


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_the_first_forward_may_be_in_inference_mode(ranks2, row):
    assert all(ranks2.run(evaluated_first, row))


def read_right_after_the_step(row):
    engine, optimizer = started(row)
    seen = []
    optimizer.register_step_post_hook(
        lambda o, *_: seen.append([p.detach().clone() for group in o.param_groups for p in group["params"]])
    )
    held = list(engine.module.parameters())
    train(engine, optimizer, 2)
    found = [p.detach().clone() for p in held]
    final = values(engine)
    return relative_error(found, final), relative_error(seen[-1], final)


@pytest.mark.parametrize("row", ["ddp", "zero1", "zero2"])
def test_lists_of_parameters_and_hooks_of_the_step_see_the_final_values(ranks3, row):
    assert ranks3.run(read_right_after_the_step, row) == [(0.0, 0.0)] * 3


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(7, 5, num_layers=2), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.lstm(x)[0])


def recurrent(row):
    engine, optimizer = started(row, Recurrent, sgd)
    alone = build(Recurrent)
    reference = sgd(alone.parameters())
    xs, ys = data(4, dist.get_world_size())
    for x, y in zip(xs, ys, strict=True):
        reference.zero_grad()
        optimizer.zero_grad()
        # One sample at a time: the recurrent layer takes the batch for a sequence.
        (sum(mse(alone, a, b) for a, b in zip(x.split(1), y.split(1), strict=True)) / len(x)).backward()
        mine = zip(my_share(x).split(1), my_share(y).split(1), strict=True)
        engine.backward(sum(mse(engine.module, a, b) for a, b in mine) / len(my_share(x)))
        reference.step()
        optimizer.step()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_recurrent_layers(ranks2, row):
    assert max(ranks2.run(recurrent, row)) < EXACT


def norms(row):
    engine, optimizer = started(row, lambda: nn.Linear(7, 3, bias=False))  # 21 numbers: the third rank has none
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


def same_optimizer_twice(row):
    module = build(Net)
    optimizer = adamw(module.parameters())
    for _ in range(2):
        engine = Engine(module, row)
        engine.add_optimizer(optimizer)
        train(engine, optimizer, 2)
        engine.close()
    alone = build(Net)
    reference = adamw(alone.parameters())
    xs, ys = data(2, dist.get_world_size())
    for _ in range(2):
        for x, y in zip(xs, ys, strict=True):
            reference.zero_grad()
            mse(alone, x, y).backward()
            reference.step()
    return relative_error(module.parameters(), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_an_optimizer_goes_on_under_a_second_engine(ranks3, row):
    assert max(ranks3.run(same_optimizer_twice, row)) < EXACT


def second_engine(row):
    module = build(Net)
    first = Engine(module, row)
    first.build()
    engine = Engine(module, row)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 1)
    return first.is_closed


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_a_second_engine_closes_the_first(ranks2, row):
    assert all(ranks2.run(second_engine, row))


def one_rank_has_the_state(row):
    engine, optimizer = started(row)
    train(engine, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    again = optimizer.state_dict()
    return (
        state.keys() == again.keys()
        and all(
            torch.equal(values["exp_avg"], again["state"][index]["exp_avg"]) for index, values in state["state"].items()
        )
        if state
        else again == {}
    )


@pytest.mark.parametrize("row", ["zero1", "zero2", "fsdp"])
def test_a_state_dict_loads_as_it_was_given(ranks2, row):
    assert all(ranks2.run(one_rank_has_the_state, row))


def recomputed(row):
    engine, optimizer = started(row, Net, sgd)
    alone = build(Net)
    reference = sgd(alone.parameters())

    def loss(module, x, y):
        x = torch.tanh(module.first(x))
        for block in module.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return ((module.last(x) - y) ** 2).mean()

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
    gathers = engine.report().collectives.get("all_gather", 0)
    return relative_error(values(engine), alone.parameters()), gathers, len(engine.units), len(engine.module.blocks)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_recomputation_gathers_nothing_more(ranks2, row):
    for error, gathers, units, blocks in ranks2.run(recomputed, row):
        assert error < EXACT
        assert gathers == {"ddp": 0, "fsdp": units + blocks}.get(row, units)


def gradient_penalty(row):
    """The gradient of the output to the input is part of the loss: backward within forward, and of it once more."""

    def loss(module, x, y):
        x = x.clone().requires_grad_()
        out = module(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return ((out - y) ** 2).mean() + (slope**2).mean()

    engine, optimizer = started(row, Net, sgd)
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


def penalty(where):
    """A term of the loss that is made from the parameters themselves."""
    engine, optimizer = started("fsdp", Net, sgd)
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


def changed_and_kept(row):
    engine, optimizer = started(row)
    train(engine, optimizer, 1)
    with engine.full_parameters(writeback=True), torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.fill_(2.0)
    return all(bool((value == 2).all()) for value in values(engine))


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_changes_to_whole_parameters_are_kept_if_asked_for(ranks3, row):
    assert all(ranks3.run(changed_and_kept, row))


def within_forward(row):
    engine, _ = started(row)
    engine.build()
    engine.module.blocks[0].linear.register_forward_hook(lambda *_: engine.full_parameters().__enter__())
    with pytest.raises(RuntimeError, match="between steps, got it within the model's forward"):
        engine.module(data(1, 1)[0][0])
    return True


@pytest.mark.parametrize("row", ["fsdp", "fsdp_partial"])
def test_whole_parameters_are_not_to_be_had_within_a_block(ranks2, row):
    assert all(ranks2.run(within_forward, row))


def unevenly_evaluated(row):
    engine, optimizer = started(row)
    train(engine, optimizer, 1)
    with torch.no_grad():
        for _ in range(5 * dist.get_rank()):  # one rank has more batches than the other
            with engine.forward_context():
                engine.module(data(1, 1)[0][0])
    train(engine, optimizer, 1)
    return values(engine)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_ranks_may_evaluate_a_different_number_of_batches(ranks2, row):
    ours, theirs = ranks2.run(unevenly_evaluated, row)
    assert relative_error(ours, theirs) == 0


def evaluated_by_one(row, make_optimizer):
    engine, optimizer = started(row, optimizer=make_optimizer)
    train(engine, optimizer, 1)
    engine.dismiss_optimizers()
    if dist.get_rank() == 0:
        with torch.no_grad(), engine.forward_context():
            engine.module(data(1, 1)[0][0])
    dist.barrier()
    engine.close()
    return True


@pytest.mark.parametrize("make_optimizer", [adamw, torch.optim.Adafactor])
def test_one_rank_may_evaluate_when_optimizers_have_gone(ranks2, make_optimizer):
    assert ranks2.run(evaluated_by_one, "fsdp", make_optimizer) == [True] * 2


def forgotten(row):
    before = threading.active_count()
    engine, optimizer = started(row)
    train(engine, optimizer, 1)
    engine.close()
    module, added = weakref.ref(engine.module), threading.active_count() - before
    del engine, optimizer
    gc.collect()
    return added, module() is None


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_a_closed_engine_leaves_nothing_behind(ranks2, row):
    assert ranks2.run(forgotten, row) == [(0, True)] * 2


def forgotten_open(row):
    engine, optimizer = started(row)
    train(engine, optimizer, 1)
    found = [weakref.ref(engine), weakref.ref(engine.module), weakref.ref(optimizer), weakref.ref(engine.units[0])]
    del engine, optimizer
    gc.collect()
    return [reference() is None for reference in found]


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_an_open_engine_that_nobody_has_any_more_leaves_nothing_behind(ranks2, row):
    assert ranks2.run(forgotten_open, row) == [[True] * 4] * 2


def interrupted(row):
    engine, optimizer = started(row)
    train(engine, optimizer, 1)
    unit = next(iter(engine._arrivals.waits))
    unit_wait = engine._arrivals.waits[unit]
    pending = unit_wait.__closure__[unit_wait.__code__.co_freevars.index("pending")].cell_contents
    real = pending.wait
    pending.wait = lambda: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        unit.parameters[0].sum()
    pending.wait = real
    held = unit.parameters[0].detach().clone()  # waits again
    engine.wait()
    return torch.equal(held, unit.parameters[0])


def test_an_interrupted_wait_is_repeated(ranks2):
    assert all(ranks2.run(interrupted, "zero2"))


def out_of_step():
    engine, optimizer = started("zero2", bucket_cap_mb=0.0005)
    train(engine, optimizer, 1)
    engine.wait()
    meet, calls = Neighbours.meet, []

    def failing(self, number, doing):
        calls.append(number)
        if dist.get_rank() == 0 and len(calls) == 2:
            raise OSError("injected")
        return meet(self, number, doing)

    Neighbours.meet = failing
    try:
        train(engine, optimizer, 1)
    except (OSError, RuntimeError) as error:
        return str(error)
    finally:
        Neighbours.meet = meet
        engine.close(abandon=True)
    return None


def test_after_an_error_in_an_operation_no_later_one_seems_to_succeed(ranks2):
    ours, theirs = ranks2.run(out_of_step)
    assert ours is not None
    assert theirs is not None
    ranks2.close()  # their messages are out of step


def assigned_and_clipped(row):
    engine, optimizer = started(row, optimizer=sgd)
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


def looked_at_and_laid_out_anew():
    module = build(Net)
    engine = Engine(module, "fsdp")
    engine.build()
    former = [weakref.ref(unit) for unit in engine.units]
    with engine.full_parameters():
        pass
    engine.add_optimizer(torch.optim.Adafactor(module.parameters()))
    engine.build()
    gc.collect()
    return sum(reference() is not None for reference in former)


def test_units_that_were_looked_at_and_taken_apart_are_freed(ranks2):
    assert ranks2.run(looked_at_and_laid_out_anew) == [0, 0]
