"""Hybrid rows: copies of the state, each divided over some of the ranks."""

from __future__ import annotations

import os
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from core.toys import Net, adamw, build, compare, data, mse, my_share, relative_error, train, values
from harness import Ranks
from lightning_accel.core import Engine
from lightning_accel.core.connecting import connect
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.mesh import Mesh, ranks_of_node
from lightning_accel.core.placement import ROWS
from lightning_accel.core.torch_collectives import TorchCollectives

EXACT = 1e-12
"""Relative error in float64 that only rounding can make."""


@pytest.fixture(scope="module")
def ranks4(ranks_of) -> Ranks:
    return ranks_of(4)


def groups(shard_size):
    mesh = Mesh.connect(connect(torch.device("cpu")), shard_size)
    of = [dist.get_process_group_ranks(part.group or dist.group.WORLD) for part in (mesh.shard, mesh.replicate) if part]
    again = Mesh.connect(connect(torch.device("cpu")), shard_size)
    assert again.shard.group is mesh.shard.group, "process groups are made once"
    copies = mesh.copies
    for made in (mesh, again):
        made.close()
    return of, copies


def test_neighbours_divide_a_copy(ranks4):
    assert ranks4.run(groups, 2) == [
        ([[0, 1], [0, 2]], 2),
        ([[0, 1], [1, 3]], 2),
        ([[2, 3], [0, 2]], 2),
        ([[2, 3], [1, 3]], 2),
    ]
    assert ranks4.run(groups, 4) == [([[0, 1, 2, 3]], 1)] * 4
    assert ranks4.run(groups, 1)[2] == ([[2], [0, 1, 2, 3]], 4)


def node_sizes(local):
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": local[dist.get_rank()]}):
        return ranks_of_node(connect(torch.device("cpu")))


def test_the_ranks_of_a_node_are_what_the_launcher_says(ranks4):
    assert ranks4.run(node_sizes, ["2", "2", "2", "2"]) == [2] * 4
    assert ranks4.run(node_sizes, ["0", "0", "0", "0"]) == [4] * 4  # unknown: those with the same host name
    errors = ranks4.run_expecting_error(node_sizes, ["3", "3", "3", "1"])
    assert all(
        error is not None and "as many ranks on one machine as on another, got 1, 3" in error[1] for error in errors
    )


@pytest.mark.parametrize("shard_size", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_parity_with_a_single_process(ranks4, shard_size, accumulate):
    errors = ranks4.run(compare, Net, "fsdp_hybrid", shard_size=shard_size, accumulate=accumulate, steps=20)
    assert max(errors) < EXACT


def with_collectives(kind):
    def messages(device, group=None):
        return kind(device, group, group)

    with (
        mock.patch("lightning_accel.core.agreement.connect", messages),
        mock.patch("lightning_accel.core.mesh.connect", messages),
    ):
        return [compare(Net, "fsdp_hybrid", shard_size=2, accumulate=n, bucket_cap_mb=0.001) for n in (1, 3)]


@pytest.mark.parametrize("kind", [GlooCollectives, TorchCollectives])
def test_parity_over_other_ways_to_send(ranks4, kind):
    assert max(map(max, ranks4.run(with_collectives, kind))) < EXACT


def mixed_use():
    """Backwards with and without the sum over copies, in turn, with gradients of a former step still there."""
    ranks = dist.get_world_size()
    alone = build(Net)
    module = build(Net)
    engine = Engine(module, "fsdp_hybrid", shard_size=2)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    xs, ys = data(5, ranks)
    for i, synced in enumerate([True, False, False, True, True]):
        mse(alone, xs[i], ys[i]).backward()
        with engine.forward_context():
            loss = mse(module, my_share(xs[i]), my_share(ys[i]))
        if synced:
            engine.backward(loss)
        else:
            with engine.no_sync():
                engine.backward(loss)
    whole = [engine.full_gradient(p) for p in module.parameters()]
    gradients = relative_error(whole, [p.grad for p in alone.parameters()])
    norm = engine.clip_grad_norm_(optimizer, 0.1)
    expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    engine.close()
    return gradients, float(abs(norm - expected) / expected)


def test_sums_of_one_copy_and_of_all_mix(ranks4):
    for gradients, norm in ranks4.run(mixed_use):
        assert gradients < EXACT
        assert norm < EXACT


def step_too_early():
    module = build(Net)
    engine = Engine(module, "fsdp_hybrid", shard_size=2)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    xs, ys = data(1, dist.get_world_size())
    with engine.forward_context(), engine.no_sync():
        engine.backward(mse(module, my_share(xs[0]), my_share(ys[0])))
    optimizer.step()


def test_a_step_on_one_copys_sum_is_refused(ranks4):
    for error in ranks4.run_expecting_error(step_too_early):
        assert error is not None
        assert "accumulated without synchronisation" in error[1]


def laid_out_anew_within_a_window():
    module = build(Net)
    engine = Engine(module, "fsdp_hybrid", shard_size=2)
    engine.add_optimizer(adamw(module.first.parameters()))
    xs, ys = data(1, dist.get_world_size())
    with engine.forward_context(), engine.no_sync():
        engine.backward(mse(module, my_share(xs[0]), my_share(ys[0])))
    engine.add_optimizer(torch.optim.Adafactor(module.blocks.parameters()))  # whole tensors: other parts
    engine.build()


def test_gradients_of_one_copy_are_not_lost_when_units_change(ranks4):
    for error in ranks4.run_expecting_error(laid_out_anew_within_a_window):
        assert error is not None
        assert "Expected no accumulated gradients when parameters are given to an optimizer" in error[1]


def frozen_within_a_window():
    module, alone = build(Net), build(Net)
    engine = Engine(module, "fsdp_hybrid", shard_size=2)
    optimizer, reference = adamw(module.parameters()), adamw(alone.parameters())
    engine.add_optimizer(optimizer)
    xs, ys = data(2, dist.get_world_size())
    for i in range(2):
        mse(alone, xs[i], ys[i]).backward()
        with engine.forward_context():
            loss = mse(module, my_share(xs[i]), my_share(ys[i]))
        with engine.no_sync() if i == 0 else nullcontext():
            engine.backward(loss)
        for net in (module, alone):
            net.blocks[1].requires_grad_(False)
    optimizer.step()
    reference.step()
    return relative_error(values(engine), alone.parameters())


def test_a_block_that_is_frozen_within_a_window_is_stepped_with_what_it_has(ranks4):
    assert max(ranks4.run(frozen_within_a_window)) < EXACT


def counted(shard_size, accumulate):
    module = build(lambda: Net(64, 4))
    engine = Engine(module, "fsdp_hybrid", shard_size=shard_size, bucket_cap_mb=0.02)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 2, accumulate=accumulate)
    report = engine.report()
    total = sum(unit.layout.total for unit in engine.units) * 8
    apart = sum(unit.layout.total for unit in engine.units if unit.block is None) * 8
    trained = values(engine)
    engine.close()
    return report, total, apart, trained


@pytest.mark.parametrize("accumulate", [1, 4])
def test_bytes_inside_and_across_are_those_of_the_table(ranks4, accumulate):
    found = ranks4.run(counted, 2, accumulate)
    for report, total, apart, trained in found:
        inside = report.bytes_sent["all_gather"] + report.bytes_sent["reduce_scatter"]
        across = report.bytes_sent["all_reduce"]
        assert inside == (3 * total - apart) * accumulate / 2  # what is in no block is gathered once, not twice
        assert across == 2 * (total / 2) / 2  # once a step, however many micro-batches
        assert inside + across == ROWS["fsdp_hybrid"].wire_bytes(total, 2, accumulate, 2) - apart * accumulate / 2
        rest = ROWS["fsdp_hybrid"].rest_bytes(total, report.shard_size)
        assert report.at_rest["parameters"] == rest["parameters"]
        assert report.at_rest["gradients"] == rest["gradients"]
        assert all(torch.equal(a, b) for a, b in zip(trained, found[0][3], strict=True)), "copies drift apart"
        assert "(2 divide a copy)" in str(report)


def start(shard_size, row="fsdp_hybrid"):
    Engine(build(Net), row, shard_size=shard_size)


@pytest.mark.parametrize(
    ("shard_size", "row", "message"),
    [
        (3, "fsdp_hybrid", "Expected shard_size to divide the number of ranks, got 3 for 4 ranks."),
        (0, "fsdp_hybrid", "Expected shard_size to divide the number of ranks, got 0 for 4 ranks."),
        (2, "fsdp", "Expected shard_size for hybrid rows only, got 2 for row 'fsdp'."),
    ],
)
def test_bad_shard_sizes_are_refused(ranks4, shard_size, row, message):
    assert ranks4.run_expecting_error(start, shard_size, row) == [("ValueError", message)] * 4
