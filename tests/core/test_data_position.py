"""Which samples are done, and how other ranks share the rest: against torch's own samplers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from lightning_accel.core import rng
from lightning_accel.core.data_position import Shares, generators_of, order_of, set_generators, shared

sizes = st.integers(1, 60)
ranks = st.integers(1, 7)
batch_sizes = st.integers(1, 9)


def sampler(size: int, ranks: int, rank: int, *, drop_last: bool = False, epoch: int = 3) -> DistributedSampler:
    made = DistributedSampler(range(size), ranks, rank, shuffle=True, seed=11, drop_last=drop_last)
    made.set_epoch(epoch)
    return made


def batches_of(size: int, ranks: int, rank: int, batch_size: int, drop_last: bool, drop_last_batch: bool) -> list[Any]:
    """What torch gives one rank in an epoch."""
    return list(BatchSampler(sampler(size, ranks, rank, drop_last=drop_last), batch_size, drop_last_batch))


@given(sizes, ranks, batch_sizes, st.booleans(), st.booleans(), st.data())
def test_counts_are_those_of_torch(
    size: int, ranks: int, batch_size: int, drop_last: bool, drop_last_batch: bool, data: st.DataObject
) -> None:
    shares = Shares(size=size, ranks=ranks, batch_size=batch_size, drop_last=drop_last, drop_last_batch=drop_last_batch)
    every = [batches_of(size, ranks, rank, batch_size, drop_last, drop_last_batch) for rank in range(ranks)]
    assert [len(batches) for batches in every] == [shares.batches()] * ranks
    assert len(sampler(size, ranks, 0, drop_last=drop_last)) == shares.samples_of_rank()
    done = data.draw(st.integers(0, shares.batches()))
    order = order_of(sampler(size, ranks, 0, drop_last=drop_last))
    used = {index for batches in every for batch in batches[:done] for index in batch}
    assert used == set(order[: shares.end(done)])


@given(sizes, ranks, ranks, batch_sizes, batch_sizes, st.data())
def test_what_is_done_and_the_rest_are_the_whole_epoch(
    size: int, before: int, after: int, batch_before: int, batch_after: int, data: st.DataObject
) -> None:
    old = Shares(size=size, ranks=before, batch_size=batch_before)
    done = data.draw(st.integers(0, old.batches()))
    order = order_of(sampler(size, before, 0))
    seen: Counter[int] = Counter()
    for rank in range(before):
        for batch in batches_of(size, before, rank, batch_before, False, False)[:done]:
            seen.update(batch)
    padded = seen.total() - old.end(done)
    start = old.end(done)
    new = Shares(size=size, ranks=after, batch_size=batch_after)
    rest = [new.rest(order, start, rank) for rank in range(after)]
    assert {-(-len(mine) // batch_after) for mine in rest} == {new.batches(start)}
    for mine in rest:
        seen.update(mine)
    padded += sum(map(len, rest)) - (size - start)
    assert set(seen) == set(range(size))
    # What there is twice is the sampler's own padding: fewer than one sample a rank, the first ones of the order.
    assert seen.total() == size + padded
    assert padded < max(before, after)
    if padded <= size:
        assert {index for index, times in seen.items() if times > 1} <= set(order[:padded])


@given(sizes, ranks, ranks, batch_sizes, st.data())
def test_ranks_that_leave_out_the_last_samples_leave_out_no_others(
    size: int, before: int, after: int, batch_size: int, data: st.DataObject
) -> None:
    old = Shares(size=size, ranks=before, batch_size=batch_size, drop_last=True)
    start = old.end(data.draw(st.integers(0, old.batches())))
    order = order_of(sampler(size, before, 0, drop_last=True))
    new = Shares(size=size, ranks=after, batch_size=batch_size, drop_last=True)
    seen = Counter(order[:start])
    for rank in range(after):
        seen.update(new.rest(order, start, rank))
    assert set(seen.values()) <= {1}
    assert size - seen.total() == (size - start) % after
    assert set(order[: seen.total()]) == set(seen)


@given(sizes, ranks, batch_sizes, st.booleans(), st.data())
def test_going_on_with_as_many_ranks_is_what_the_sampler_does(
    size: int, ranks: int, batch_size: int, drop_last: bool, data: st.DataObject
) -> None:
    shares = Shares(size=size, ranks=ranks, batch_size=batch_size, drop_last=drop_last)
    done = data.draw(st.integers(0, shares.batches()))
    order = order_of(sampler(size, ranks, 0, drop_last=drop_last))
    for rank in range(ranks):
        batches = batches_of(size, ranks, rank, batch_size, drop_last, False)
        rest = shares.rest(order, shares.end(done), rank)
        assert list(BatchSampler(rest, batch_size, False)) == batches[done:]
    assert shares.batches(shares.end(done)) == shares.batches() - done


@given(sizes, ranks, batch_sizes, st.integers(1, 20), st.data())
def test_an_epoch_that_is_cut_ends_where_it_would_have(
    size: int, ranks: int, batch_size: int, limit: int, data: st.DataObject
) -> None:
    shares = Shares(size=size, ranks=ranks, batch_size=batch_size)
    length = min(limit, shares.batches())
    done = data.draw(st.integers(0, length))
    assert shares.batches_within(limit, shares.end(done)) == length - done
    assert shares.batches_within(float("inf"), shares.end(done)) == shares.batches() - done


@given(sizes, batch_sizes, st.lists(st.tuples(ranks, st.integers(0, 3)), min_size=1, max_size=4))
def test_a_run_may_change_its_ranks_as_often_as_it_likes(
    size: int, batch_size: int, legs: list[tuple[int, int]]
) -> None:
    order = order_of(sampler(size, 1, 0))
    start, seen = 0, Counter[int]()
    for count, done in legs:
        shares = Shares(size=size, ranks=count, batch_size=batch_size)
        samples = [shares.rest(order, start, rank)[: done * batch_size] for rank in range(count)]
        start = shares.end(done, start)
        for mine in samples:
            seen.update(mine)
    assert set(seen) == set(order[:start])


def test_order_that_a_sampler_wraps_is_drawn_once() -> None:
    """Lightning's wrapper has another sampler draw, and all of its ranks draw the same."""
    torch.manual_seed(0)
    first = list(DistributedSamplerWrapper(RandomSampler(range(17)), 3, 1, shuffle=True, seed=4))
    after = torch.rand(1)
    torch.manual_seed(0)
    order = order_of(DistributedSamplerWrapper(RandomSampler(range(17)), 3, 1, shuffle=True, seed=4))
    assert torch.equal(torch.rand(1), after)
    assert sorted(order) == list(range(17))
    assert Shares(size=17, ranks=3, batch_size=1).rest(order, 0, 1) == first


class Blocks(DistributedSampler):
    """Gives each rank a block of its own."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank * self.num_samples, (self.rank + 1) * self.num_samples))


def test_an_order_that_cannot_be_told_is_an_error() -> None:
    with pytest.raises(ValueError, match="Blocks does something else"):
        order_of(Blocks(range(12), 2, 1))


class Pairs(BatchSampler):
    """A batch sampler of the user's."""


def test_what_is_known_to_be_shared() -> None:
    mine = sampler(20, 4, 2, drop_last=True)
    known = shared(DataLoader(range(20), batch_size=3, sampler=mine, drop_last=True))
    assert known is not None
    assert known.sampler is mine
    assert known.rank == 2
    assert known.shares == Shares(size=20, ranks=4, batch_size=3, drop_last=True, drop_last_batch=True)
    assert known.described()["seed"] == 11
    assert known.described()["epoch"] == 3
    order = order_of(mine)
    assert list(known.rest(8)) == [order[8:][2::4][:3]]  # drop_last: 12 of them, 3 for each rank
    single = shared(DataLoader(range(20), batch_size=None, sampler=mine))
    assert single is not None
    assert list(single.rest(8)) == order[8:][2::4]


@pytest.mark.parametrize(
    "loader",
    [
        [1, 2, 3],
        DataLoader(range(9), batch_size=2, shuffle=True),
        DataLoader(range(9), batch_sampler=Pairs(DistributedSampler(range(9), 2, 0), 2, False)),
        DataLoader(range(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 2, False)),
    ],
    ids=["list", "own order", "own batches", "own batch sampler"],
)
def test_what_is_not_known_to_be_shared(loader: Any) -> None:
    assert shared(loader) is None


class Jumble(Sampler[int]):
    """Has a generator of Python's."""

    def __init__(self) -> None:
        self.generator = random.Random(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.sample(range(6), 6))

    def __len__(self) -> int:
        return 6


class Noisy(list):
    """A data set with a generator."""

    def __init__(self) -> None:
        super().__init__(range(6))
        self.generator = torch.Generator()


def test_generators_are_found_wherever_they_are() -> None:
    data, inner = Noisy(), Jumble()
    mine = torch.Generator()
    loader = DataLoader(
        data, batch_size=2, sampler=DistributedSamplerWrapper(inner, num_replicas=2, rank=0), generator=mine
    )
    found = generators_of(loader)
    assert {id(generator) for generator in found} == {id(mine), id(data.generator), id(inner.generator)}
    assert [id(generator) for generator in found] == [id(generator) for generator in generators_of(loader)]


def test_generators_within_are_found_and_what_is_not_of_the_loader_is_not() -> None:
    data = [Noisy(), {"transforms": (Jumble(), torch.nn.Dropout())}]
    loader = DataLoader(data, batch_size=1)  # type: ignore[arg-type]
    assert generators_of(loader) == [data[0].generator, data[1]["transforms"][0].generator]  # type: ignore[attr-defined,index]
    module = torch.nn.Linear(1, 1)
    module.generator = torch.Generator()  # type: ignore[assignment]
    assert generators_of(DataLoader([module], batch_size=1)) == []  # type: ignore[arg-type]
    assert generators_of(DataLoader([torch.Generator()] * 101, batch_size=1)) == []  # type: ignore[arg-type]


def test_generators_are_set() -> None:
    fresh = Jumble()
    expected = random.Random(5).sample(range(6), 6)
    set_generators(DataLoader(range(6), sampler=fresh), [rng.generator_state(random.Random(5))])
    assert list(fresh) == expected
    set_generators(DataLoader(range(6)), [rng.generator_state(random.Random(5))])  # the user has taken it out
