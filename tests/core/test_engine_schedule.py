"""What the engine sends, gathers, copies and keeps, and when: counted, not hoped for."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from core.toys import (
    EXACT,
    ROW_NAMES,
    Net,
    build,
    data,
    my_share,
    prepared,
    relative_error,
    sgd,
    started,
    train,
    values,
)
from lightning_accel.core import ROWS, Rest
from rows import everyday


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


def recomputed(row):
    engine, optimizer = prepared(row, Net, sgd)
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
