"""Optimizer state that is put together when its values are asked for is the state that is put together at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from core.toys import prepared, train
from harness import Ranks
from lightning_accel.core import Engine
from lightning_accel.core.checkpoint import StoredTensor
from lightning_accel.core.collecting import Collecting

Values = dict[tuple[int, str], Any]


def trained(row: str, make: Callable[[Any], torch.optim.Optimizer], **options: Any) -> tuple[Engine, Any]:
    engine, optimizer = prepared(row, optimizer=make, **options)
    train(engine, optimizer, 2)
    return engine, next(iter(engine.optimizers))


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=0.01)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, amsgrad=True)


def both_ways(row: str, make: Callable[[Any], torch.optim.Optimizer], **options: Any) -> tuple[Values, Values, int]:
    """All values of the state at once, and one by one in the opposite order; and how many came from other ranks."""
    engine, added = trained(row, make, **options)
    at_once = _values(added.state_dict())
    later = Collecting(engine.collectives)
    waiting = _values(added.state_dict(later))
    stored = [value for value in waiting.values() if isinstance(value, StoredTensor)]
    assert all(box.sizes == value.shape for value in stored for box in value.boxes)

    def read() -> Values:
        found = {}
        for key in reversed(waiting):
            value = waiting[key]
            found[key] = value.full() if isinstance(value, StoredTensor) else value
        return found

    one_by_one = later.run(read) or {}
    engine.close()
    return at_once, one_by_one, len(stored)


def _values(state: dict[str, Any]) -> Values:
    return {(index, key): value for index, entry in state.get("state", {}).items() for key, value in entry.items()}


def assert_same(found: list[tuple[Values, Values, int]]) -> None:
    for rank, (at_once, one_by_one, stored) in enumerate(found):
        assert bool(at_once) == (rank == 0)
        assert one_by_one.keys() == at_once.keys()
        assert (stored > 0) == (rank == 0)
        for key, value in at_once.items():
            other = one_by_one[key]
            assert torch.equal(other, value) if isinstance(value, Tensor) else other == value


@pytest.mark.parametrize("make", [adamw, adafactor])
@pytest.mark.parametrize("row", ["zero1", "fsdp"])
def test_values_are_those_that_are_put_together_at_once(ranks3: Ranks, row: str, make: Any) -> None:
    assert_same(ranks3.run(both_ways, row, make))


def test_the_first_copy_of_the_state_is_enough(ranks_of: Callable[[int], Ranks]) -> None:
    assert_same(ranks_of(4).run(both_ways, "fsdp_hybrid", adamw, shard_size=2))


def test_what_all_ranks_have_is_there_at_once(ranks2: Ranks) -> None:
    for at_once, _, stored in ranks2.run(both_ways, "ddp", adamw):
        assert at_once
        assert stored == 0


def look_too_early(row: str) -> str:
    engine, added = trained(row, adamw)
    waiting = _values(added.state_dict(Collecting(engine.collectives)))
    message = ""
    for value in waiting.values():
        if isinstance(value, StoredTensor):
            with pytest.raises(RuntimeError) as caught:
                value.sum()
            message = str(caught.value)
    engine.close()
    return message


def test_who_looks_at_other_times_is_told(ranks2: Ranks) -> None:
    first, second = ranks2.run(look_too_early, "fsdp")
    assert first.startswith("Expected optimizer state that is about to be saved not to be looked at")
    assert second == ""


def fail_between(row: str) -> tuple[str, bool]:
    engine, added = trained(row, adamw)
    later = Collecting(engine.collectives)
    waiting = _values(added.state_dict(later))

    def read() -> None:
        next(value for value in waiting.values() if isinstance(value, StoredTensor)).full()
        raise OSError("the disk is full")

    error = ""
    try:
        later.run(read)
    except OSError as caught:
        error = str(caught)
    again = added.state_dict()  # nobody waits for anybody
    engine.close()
    return error, bool(again)


def test_an_error_of_rank_0_ends_the_others_waiting(ranks2: Ranks) -> None:
    assert ranks2.run(fail_between, "fsdp") == [("the disk is full", True), ("", False)]


def nothing_to_do() -> list[str | None]:
    engine, _ = trained("ddp", adamw)
    later = Collecting(engine.collectives)
    result = later.run(lambda: "done")
    engine.close()
    return [result]


def test_with_nothing_to_put_together_nobody_waits(ranks2: Ranks) -> None:
    assert ranks2.run(nothing_to_do) == [["done"], [None]]
