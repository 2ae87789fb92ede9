"""The schedule: what is reduced, gathered and agreed on, and that the numbers are those of a single process."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.toys import (
    ROW_NAMES,
    Net,
    adamw,
    build,
    compare,
    data,
    mse,
    my_share,
    relative_error,
    sgd,
    train,
    train_alone,
    values,
)
from lightning_accel.core import ROWS, Engine, Rest
from lightning_accel.core.layout import ALIGNMENT
from lightning_accel.core.placeholder import ShardedGradient
from lightning_accel.core.unit import Content
from rows import everyday

# Two runs in double precision that differ only in the order of sums: rounding gives about 1e-16, a bug far more.
EXACT = 1e-12


def started(row, make=Net, optimizer=adamw, **options):
    module = build(make)
    engine = Engine(module, row, **options)
    made = optimizer([p for p in module.parameters() if p.requires_grad])
    engine.add_optimizer(made)
    engine.build()
    return engine, made


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("row", everyday(ROW_NAMES))
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_equals_the_single_process(world, row, accumulate):
    assert max(world.run(compare, Net, row, accumulate=accumulate, bucket_cap_mb=0.001)) < EXACT


@pytest.mark.parametrize("cap", [0.0005, 25])
def test_one_unit_or_many_make_no_difference(ranks2, cap):
    assert max(ranks2.run(compare, Net, "zero2", bucket_cap_mb=cap)) < EXACT


def many_groups(parameters):
    listed = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for p in listed if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in listed if p.dim() == 1], "weight_decay": 0.0, "lr": 0.03},
        ],
        lr=0.01,
    )


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_parameter_groups(ranks3, row):
    assert max(ranks3.run(compare, Net, row, many_groups)) < EXACT


class Odd(nn.Module):
    """Scalars, empty, non-contiguous, channels-last, tied, frozen, complex and twice-used parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = nn.Parameter(torch.randn(8, 8).t() / 3)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.second.weight
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.offset = nn.Parameter(torch.tensor(-0.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.conv = nn.Conv2d(2, 2, (1, 3), padding=(0, 1)).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = self.tied(torch.tanh(self.second(x))) + self.second(x) * self.scale + self.offset
        x = self.conv(x.view(-1, 2, 1, 4)).reshape(-1, 8)
        x = x + self.frozen(x) + torch.cat([self.phase.real, self.phase.imag]) + self.empty.sum()
        return self.last(x)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_odd_parameters(world, row):
    assert max(world.run(compare, Odd, row, sgd, bucket_cap_mb=0.0005)) < EXACT


class MixedTypes(Net):
    def __init__(self):
        super().__init__()
        self.gain = nn.ParameterList([torch.ones(13, dtype=torch.bfloat16)])

    def forward(self, x):
        x = torch.tanh(self.first(x)) * self.gain[0].to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def two_dtypes(row):
    module = MixedTypes()
    for part in (module.first, module.blocks, module.last):
        part.double()
    engine = Engine(module, row)
    optimizer = sgd(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 3)
    dtypes = {unit.flat.dtype for unit in engine.units}
    with engine.full_parameters():
        gain = module.gain[0].detach().clone()
    moved = not torch.equal(gain, torch.ones_like(gain))
    everyone = engine.collectives.gather_objects(gain.tolist())
    return dtypes, moved, all(values == everyone[0] for values in everyone)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_parameters_of_two_dtypes(ranks2, row):
    for dtypes, moved, same in ranks2.run(two_dtypes, row):
        assert dtypes == {torch.float64, torch.bfloat16}
        assert moved
        assert same


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


# --------------------------------------------------------- unused parameters


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


# ------------------------------------------------------ several optimizers


def two_optimizers(row):
    """A GAN's alternation: each optimizer's parameters are toggled off while the other trains."""
    ranks = dist.get_world_size()
    alone, module, (xs, ys) = build(Net), build(Net), data(8, ranks)
    parts = [lambda m: [*m.first.parameters(), *m.blocks.parameters()], lambda m: list(m.last.parameters())]
    references = [adamw(part(alone)) for part in parts]
    engine = Engine(module, row)
    optimizers = [sgd(parts[1](module)), adamw(parts[0](module))][::-1]
    references[1] = sgd(parts[1](alone))
    for optimizer in optimizers:
        engine.add_optimizer(optimizer)
    for i in range(8):
        which = i % 2
        for model in (alone, module):
            for index, part in enumerate(parts):
                for parameter in part(model):
                    parameter.requires_grad_(index == which)
        references[which].zero_grad()
        optimizers[which].zero_grad()
        mse(alone, xs[i], ys[i]).backward()
        engine.before_forward()
        engine.backward(mse(module, my_share(xs[i]), my_share(ys[i])))
        references[which].step()
        optimizers[which].step()
        for model in (alone, module):
            model.requires_grad_(True)
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_two_optimizers_that_take_turns(ranks2, row):
    assert max(ranks2.run(two_optimizers, row)) < EXACT


# ----------------------------------------------------------------- buffers


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)
        self.register_buffer("constant", torch.ones(1000))

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def batch_norm(row):
    ours, theirs = build(Normed), nn.parallel.DistributedDataParallel(build(Normed))
    engine = Engine(ours, row)
    optimizer, reference = sgd(ours.parameters()), sgd(theirs.parameters())
    engine.add_optimizer(optimizer)
    xs, ys = data(5, 2 * dist.get_world_size())
    for x, y in zip(xs, ys, strict=True):
        for made in (optimizer, reference):
            made.zero_grad()
        engine.backward(mse(ours, my_share(x), my_share(y)))
        mse(theirs, my_share(x), my_share(y)).backward()
        optimizer.step()
        reference.step()
    error = relative_error(values(engine), theirs.module.parameters())
    buffers = {name: b.tolist() for name, b in ours.norm.named_buffers()}
    expected = {name: b.tolist() for name, b in theirs.module.norm.named_buffers()}
    return error, buffers, expected, engine.report().bytes_sent["broadcast"]


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_buffers_follow_rank_0_as_under_torch_ddp(ranks2, row):
    (error, ours, theirs, sent), (_, other, _, _) = ranks2.run(batch_norm, row)
    # Both average two ranks' gradients in double precision.
    assert error < EXACT
    assert ours == theirs
    assert other == ours  # torch DDP has the other ranks catch up only at the next forward
    # Running mean and variance and the count of batches travel; the constant never does.
    assert sent == (8 + 8) * 8 + 8


# --------------------------------------------------- counted, not hoped for


def counted(row, accumulate):
    engine, optimizer = started(row, lambda: Net(64, 4), bucket_cap_mb=0.02)
    train(engine, optimizer, 2, accumulate=accumulate)
    report = engine.report()
    size = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    padding = sum(unit.layout.padding * 8 for unit in engine.units)
    blocks = sum(unit.block is not None for unit in engine.units)
    apart = sum(unit.layout.total * 8 for unit in engine.units if unit.block is None)
    return report, size, padding, len(engine.units), len(list(engine.module.parameters())), (blocks, apart)


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("row", everyday(ROW_NAMES))
@pytest.mark.parametrize("accumulate", [1, 4])
def test_bytes_and_collectives_are_those_of_the_table(world, row, accumulate):
    ranks = len(world.run(dist.get_rank))
    for report, size, padding, units, parameters, (blocks, apart) in world.run(counted, row, accumulate):
        theory = ROWS[row].wire_bytes(size, ranks, accumulate)
        with_padding = ROWS[row].wire_bytes(size + padding, ranks, accumulate)
        if row == "fsdp":  # what is in no block stays from forward to backward and is gathered once, not twice
            with_padding -= apart * accumulate * (ranks - 1) / ranks
        sent = dict(report.bytes_sent)
        agree = sent.pop("agree")
        assert sum(sent.values()) == with_padding
        assert agree < 0.01 * theory
        assert sum(sent.values()) - with_padding + theory <= 1.01 * theory

        backwards = accumulate if ROWS[row].accumulating is Rest.SHARDED else 1
        assert report.collectives.pop("agree") == 2 * backwards
        gathers = {"fsdp": (units + blocks) * backwards, "fsdp_partial": units * backwards}.get(row, units)
        expected = {"reduce_scatter": units * backwards, "all_gather": gathers}
        if row == "ddp":
            expected = {"all_reduce": units}
        assert report.collectives == expected

        # One write for each gradient that arrives, and nothing else outside of collectives.
        assert report.copies == {"gradient_writes": parameters * accumulate}

        rest = ROWS[row].rest_bytes(size, ranks)
        assert abs(report.at_rest["parameters"] - report.padding["parameters"] - rest["parameters"]) <= padding
        assert abs(report.at_rest["gradients"] - report.padding["gradients"] - rest["gradients"]) <= padding
        # A shard's share of the padding may be elsewhere: at most the padding off. A step count a segment is extra.
        assert abs(report.at_rest["optimizer_state"] - rest["optimizer_state"]) <= 2 * padding + 8 * 2 * units


def whole_model_bytes(row):
    engine, optimizer = started(row, lambda: Net(64, 4))
    train(engine, optimizer, 2)
    report = engine.report()
    return report.at_rest, report.padding


def test_the_ranks_shards_add_up_to_the_whole(ranks3):
    reports = ranks3.run(whole_model_bytes, "zero2")
    whole = sum(p.numel() for p in Net(64, 4).parameters()) * 8
    assert sum(rest["gradients"] - padding["gradients"] for rest, padding in reports) == whole


def pool_peak():
    engine, optimizer = started("zero2", lambda: Net(64, 8), bucket_cap_mb=0.001)
    train(engine, optimizer, 3)
    largest = max(unit.flat.numel() * 8 for unit in engine.units)
    return engine.report().transient, largest, len(engine.units)


def test_zero2_borrows_no_more_than_three_units_of_gradients(ranks2):
    for peak, largest, units in ranks2.run(pool_peak):
        assert units > 6
        # Two reductions under way and one unit that fills.
        assert peak <= 3 * largest


def overlap(row):
    """Which units were launched before the last gradient arrived, and which were gathered at each block's forward."""
    engine, optimizer = started(row, lambda: Net(16, 4), bucket_cap_mb=0.001)
    train(engine, optimizer, 1)  # learn the order
    launched, pending, before = [], [], len(engine._arrivals.waits)
    engine.module.first.weight.register_hook(lambda _: launched.append(engine._reduction._next))
    for block in engine.module.blocks:
        block.register_forward_pre_hook(lambda *_: pending.append(len(engine._arrivals.waits)))
    train(engine, optimizer, 1)
    return launched, before, pending, len(engine.units)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_reductions_overlap_backward_and_gathers_overlap_forward(ranks2, row):
    for launched, before, pending, units in ranks2.run(overlap, row):
        assert units == 6
        assert launched == [units - 1]  # all but the unit of the first layer were on their way
        if row in ("ddp", "fsdp", "fsdp_partial"):
            assert before == 0
        else:
            # Every unit was on its way after the step, and each was waited for only when forward came to it.
            assert before == units
            assert pending == [5, 4, 3, 2]


def launch_order(row):
    class Backwards(Net):
        def forward(self, x):  # uses its blocks in the order opposite to that of registration
            x = torch.tanh(self.first(x))
            for block in reversed(self.blocks):
                x = block(x)
            return self.last(x)

    engine, optimizer = started(row, Backwards, bucket_cap_mb=0.0005)
    train(engine, optimizer, 2)
    return [unit.name for unit in engine.units]


def test_the_launch_order_is_learned_from_backward(ranks2):
    ours, theirs = ranks2.run(launch_order, "zero2")
    assert ours == theirs
    assert [name for name in ours if name.startswith("blocks")] == ["blocks.0", "blocks.1", "blocks.2"]


# --------------------------------------------------- what parameters show


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


# --------------------------------------------------------------- mistakes


def plain_backward(row):
    engine, _ = started(row)
    mse(engine.module, *(t[0] for t in data(1, 1))).backward()


def step_without_reduction(row):
    engine, optimizer = started(row)
    with engine.no_sync():
        engine.backward(mse(engine.module, *(t[0] for t in data(1, 1))))
    optimizer.step()


def sparse(row):
    module = nn.Embedding(10, 4, sparse=True)
    engine = Engine(module, row)
    engine.backward(module(torch.tensor([1, 2])).sum())


def added_later(row):
    engine, _ = started(row)
    engine.module.extra = nn.Linear(2, 2)
    engine.before_forward()


def after_close(row):
    engine, optimizer = started(row)
    engine.close()
    optimizer.step()


def unknown_optimizer(row):
    engine, _ = started(row)
    engine.clip_grad_norm_(torch.optim.SGD([torch.zeros(1)], 0.1), 1.0)


def toggled_differently(row):
    engine, _ = started(row, bucket_cap_mb=0.0001)
    engine.module.last.requires_grad_(dist.get_rank() == 0)
    engine.backward(mse(engine.module, *(t[0] for t in data(1, 1))))


def lazy(row):
    Engine(nn.LazyLinear(2), row)


@pytest.mark.parametrize(
    ("mistake", "kind", "message"),
    [
        (plain_backward, "RuntimeError", "arrived outside of the engine's backward.*manual_backward"),
        (sparse, "RuntimeError", "dense gradients.*sparse=False"),
        (added_later, "RuntimeError", "'extra.weight' was added, or replaced"),
        (after_close, "RuntimeError", "this one was closed"),
        (unknown_optimizer, "ValueError", "another SGD.*add_optimizer"),
        (
            toggled_differently,
            "RuntimeError",
            "ranks differ in 'last.weight', 'last.bias'|ranks differ in 'last.bias', 'last.weight'",
        ),
        (lazy, "ValueError", "weight.* lazy"),
    ],
)
def test_mistakes_have_clear_errors(ranks2, mistake, kind, message):
    for found, text in ranks2.run_expecting_error(mistake, "zero2"):
        assert found == kind
        assert __import__("re").search(message, text, __import__("re").S), text


@pytest.mark.parametrize("row", ["ddp", "zero1"])
def test_stepping_with_gradients_that_were_never_reduced_is_an_error(ranks2, row):
    for kind, text in ranks2.run_expecting_error(step_without_reduction, row):
        assert kind == "RuntimeError"
        assert "without synchronisation (no_sync)" in text


def test_an_engine_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"initialised torch.distributed process group.*torchrun"):
        Engine(Net(), "ddp")


def differing(what):
    torch.manual_seed(0)
    module = Net()
    if dist.get_rank() == 1:
        if what == "shape":
            module.last = nn.Linear(13, 4)
        elif what == "dtype":
            module.last.double()
        elif what == "name":
            module.extra = module.last
        elif what == "order":
            module.first, module._modules["first"] = module._modules.pop("first"), None
            module._modules["first"] = module.first
        elif what == "frozen":
            module.blocks[1].requires_grad_(False)
        elif what == "buffer":
            module.register_buffer("extra", torch.zeros(2))
    Engine(module, "zero1")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", "rank 0 has parameter 'last.weight': shape (3, 13), torch.float32, trainable, rank 1 has parameter"),
        ("dtype", "rank 1 has parameter 'last.weight': shape (3, 13), torch.float64"),
        ("name", "rank 0 has nothing more, rank 1 has parameter 'extra.weight'"),
        ("frozen", "rank 1 has parameter 'blocks.1.linear.weight': shape (13, 13), torch.float32, frozen"),
        ("buffer", "rank 0 has nothing more, rank 1 has buffer 'extra'"),
    ],
)
def test_ranks_whose_models_differ_all_get_the_first_difference(ranks2, what, message):
    for kind, text in ranks2.run_expecting_error(differing, what):
        assert kind == "ValueError"
        assert message in text


def contents(row):
    engine, optimizer = started(row)
    train(engine, optimizer, 1)
    return [content for unit in engine.units for content in unit.content]


def test_after_a_step_gradients_stay_until_they_are_zeroed(ranks2):
    for found in ranks2.run(contents, "zero2"):
        assert set(found) == {Content.REDUCED}


def alone_is_right():
    module = build(Net)
    train_alone(module, adamw(module.parameters()), 2, 1)
    return relative_error(module.parameters(), build(Net).parameters())


def test_the_reference_itself_trains():
    assert alone_is_right() > 1e-3
