"""Orders that samplers draw again, as if they had drawn them once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler

from lightning_accel.core import rng
from lightning_accel.core.orders import Opened, Orders, after_batches, after_orders, opens_at_once

SIZE = 12


class Eager(Sampler[int]):
    """Draws its order from a generator of its own, and from the process, when it is opened."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __iter__(self) -> Iterator[int]:
        first = torch.randperm(SIZE, generator=self.generator)
        return iter(first[torch.randperm(SIZE)].tolist())

    def __len__(self) -> int:
        return SIZE


def loader(**options: Any) -> DataLoader[int]:
    return DataLoader(range(SIZE), batch_size=None, sampler=Eager(), **options)  # type: ignore[arg-type]


def state(of: DataLoader[int]) -> tuple[Any, Any]:
    return rng.collect()["torch"].tolist(), of.sampler.generator.get_state().tolist()  # type: ignore[attr-defined]


@pytest.mark.parametrize("counts", [1, 2])
def test_orders_are_drawn_as_if_only_those_that_count_had_been(counts: int) -> None:
    torch.manual_seed(0)
    plain = loader()
    expected = [list(plain.sampler) for _ in range(counts)]
    after = state(plain)

    torch.manual_seed(0)
    again = loader()
    orders = Orders(again, [again.sampler.generator], counts)  # type: ignore[attr-defined]
    drawn = [list(orders.open(again.sampler)) for _ in range(counts + 3)]
    assert drawn == [*expected, *[expected[-1]] * 3]
    orders.end()
    assert state(again) == after


@pytest.mark.parametrize(("workers", "reset", "which"), [(0, False, 0), (2, False, 1), (2, True, 0)])
def test_the_order_that_counts_is_the_last_that_an_iterator_draws(workers: int, reset: bool, which: int) -> None:
    plain = loader(num_workers=workers)
    torch.manual_seed(0)
    position = {"made": rng.collect(), "generators": [plain.sampler.generator.get_state()], "is_reset": reset}  # type: ignore[attr-defined]
    expected = []
    for _ in range(2):
        expected.append(list(plain.sampler))
        torch.empty((), dtype=torch.int64).random_()  # as torch does for its workers' seed, between the two
    torch.manual_seed(5)
    list(plain.sampler)
    assert list(after_orders(plain, position, iter, plain.sampler)) == expected[which]


def test_what_draws_as_an_iterator_is_made() -> None:
    data = range(SIZE)
    assert opens_at_once(loader())
    assert opens_at_once(DataLoader(data, batch_size=None, sampler=DistributedSampler(data, 2, 0)))  # type: ignore[arg-type]
    assert not opens_at_once(DataLoader(data, batch_size=None, sampler=RandomSampler(data)))  # type: ignore[arg-type]
    assert not opens_at_once(DataLoader(data, batch_size=2, sampler=Eager()))  # type: ignore[arg-type]
    assert not opens_at_once(DataLoader(data, batch_sampler=BatchSampler(Eager(), 2, False)))  # type: ignore[arg-type]


def test_indices_are_opened_once_and_when_they_are_asked_for() -> None:
    calls: list[int] = []

    def way() -> Iterator[Any]:
        calls.append(1)
        return after_batches(2, range(5))

    indices = Opened(way)
    assert iter(indices) is indices
    assert not calls
    indices.open()
    assert list(indices) == [2, 3, 4]
    assert len(calls) == 1
