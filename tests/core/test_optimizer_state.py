"""The state of whole parameters goes to rank 0 alone: what is sent for it, and what is kept of what was loaded."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from core.test_live_memory import BLOCKS, Deep, unit_bytes
from core.toys import Net, adamw, build, live_bytes, prepared, settled_bytes, train
from harness import Ranks
from lightning_accel.core import Engine, full_state, optimizer_state
from lightning_accel.core.collectives import nbytes


def sent(row: str, **options: object) -> tuple[dict[str, int], int, bool]:
    """What one ``state_dict()`` sends by kind, the bytes of this rank's part of the state, and whether it has all."""
    engine, optimizer = prepared(row, **options)
    train(engine, optimizer, 2)
    engine.wait()
    engine.collectives.traffic.take()
    state = optimizer.state_dict()
    _, counted = engine.collectives.traffic.take()
    values = [value for entry in optimizer.state.values() for value in entry.values()]
    mine = sum(nbytes(value) for value in values if value.dim())
    engine.close()
    return counted, mine, bool(state)


@pytest.mark.parametrize("row", ["zero1", "fsdp"])
def test_each_tensor_is_sent_once(ranks3: Ranks, row: str) -> None:
    for rank, (counted, mine, has_state) in enumerate(ranks3.run(sent, row)):
        assert counted == {"gather": mine if rank else 0}
        assert mine > 0
        assert has_state == (rank == 0)


def test_where_all_have_it_nothing_is_sent(ranks2: Ranks) -> None:
    for counted, _, has_state in ranks2.run(sent, "ddp"):
        assert counted == {}
        assert has_state


def test_other_copies_of_the_state_send_nothing(ranks_of: Callable[[int], Ranks]) -> None:
    found = ranks_of(4).run(sent, "fsdp_hybrid", shard_size=2)
    assert [counted for counted, _, _ in found] == [{"gather": 0}, {"gather": found[1][1]}, {}, {}]
    assert [has_state for _, _, has_state in found] == [True, False, False, False]


def watched(width: int, limit: int) -> tuple[int, int]:
    """Live bytes while the state is collected, above those before: at most, and when it is there.

    More than the limit counts only if it lasts: gloo's threads let go of a message after it has arrived.
    """
    module = Deep(width)
    engine = Engine(module, "fsdp", bucket_cap_mb=0.001)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    engine.backward(module(torch.randn(1, width)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    before, peak = settled_bytes(), 0

    def watch(*args: object) -> Tensor | None:
        nonlocal peak
        whole = full_state.put_together(*args)
        now = live_bytes() - before
        peak = max(peak, now if now < limit else settled_bytes() - before)
        return whole

    with mock.patch.object(optimizer_state, "put_together", watch):
        state = optimizer.state_dict()
    there = settled_bytes() - before
    engine.close()
    assert bool(state["state"] if state else {}) == (there > 4096)
    return peak, there


def test_rank_0_has_the_state_and_one_tensor_more_and_the_others_nothing(ranks2: Ranks) -> None:
    width, small = 128, 8192
    whole = 2 * BLOCKS * unit_bytes(width)
    limit = whole + unit_bytes(width) // 2 + small
    (peak, there), (other_peak, other_there) = ranks2.run(watched, width, limit)
    assert whole <= there < whole + small
    assert peak < limit, "one value of what a rank has of a unit"
    assert max(other_peak, other_there) < small


def loaded(row: str) -> None:
    """Parameters in no unit, as frozen ones: their state waits, and must not be a part of the file it came from."""
    module = build(Net)
    optimizer = adamw(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    given = optimizer.state_dict()
    fresh = build(Net)
    fresh.first.requires_grad_(False)
    engine = Engine(fresh, row)
    theirs = adamw(fresh.parameters())
    engine.add_optimizer(theirs)
    theirs.load_state_dict(given)
    expected = copy.deepcopy(given["state"])
    for entry in given["state"].values():
        for value in entry.values():
            value.fill_(torch.nan)
    found = theirs.state_dict()
    for index, entry in expected.items() if found else ():
        for key, value in entry.items():
            assert torch.equal(found["state"][index][key], value)
    engine.close()


@pytest.mark.parametrize("row", ["ddp", "zero2"])
def test_nothing_that_was_loaded_is_kept(ranks2: Ranks, row: str) -> None:
    ranks2.run(loaded, row)
