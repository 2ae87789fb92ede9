"""All ranks go through the same permutation, whatever their own random numbers, and another one in each epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_accel.data import ShardedLoader, prepare_data_loader

SIZE = 23


class Own(Sampler[int]):
    """Draws from Python's random numbers, as samplers of users' own do."""

    def __iter__(self) -> Iterator[int]:
        order = list(range(SIZE))
        random.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return SIZE


class OwnBatches(Own):
    batch_size = 3

    def __iter__(self) -> Iterator[Any]:
        order = list(super().__iter__())
        return iter([order[start : start + 3] for start in range(0, SIZE, 3)])

    def __len__(self) -> int:
        return -(-SIZE // 3)


class Shuffled(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SIZE).tolist())


def torchdata(**kwargs: Any) -> DataLoader[Any]:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    loader: DataLoader[Any] = module.StatefulDataLoader(range(SIZE), **kwargs)
    return loader


KINDS: dict[str, Any] = {
    "shuffle": lambda: DataLoader(range(SIZE), batch_size=3, shuffle=True),  # type: ignore[arg-type]
    "generator": lambda: DataLoader(
        range(SIZE),  # type: ignore[arg-type]
        batch_size=3,
        shuffle=True,
        generator=torch.Generator().manual_seed(4),
    ),
    "subset": lambda: DataLoader(range(SIZE), batch_size=3, sampler=SubsetRandomSampler(range(SIZE))),  # type: ignore[arg-type]
    "own": lambda: DataLoader(range(SIZE), batch_size=3, sampler=Own()),  # type: ignore[arg-type]
    "own batches": lambda: DataLoader(range(SIZE), batch_sampler=OwnBatches()),  # type: ignore[arg-type]
    "stream": lambda: DataLoader(Shuffled(), batch_size=3),
    "stateful": lambda: torchdata(batch_size=3, shuffle=True),
    "single": lambda: DataLoader(range(SIZE), batch_size=None, shuffle=True),  # type: ignore[arg-type]
}


def prepared(kind: str, rank: int, ranks: int, **kwargs: Any) -> ShardedLoader:
    torch.manual_seed(100 + rank)
    random.seed(100 + rank)
    return prepare_data_loader(KINDS[kind](), rank=rank, ranks=ranks, even_batches=False, **{"seed": 7, **kwargs})


def epoch(loaders: list[ShardedLoader]) -> list[list[int]]:
    """What each rank gets; ranks go on in turns, with random numbers that none of the others has."""
    return [[index for batch in loader for index in torch.as_tensor(batch).reshape(-1).tolist()] for loader in loaders]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_share_one_order_and_epochs_differ(kind: str, ranks: int) -> None:
    if kind == "stream" and ranks == 1:
        pytest.skip("a single process goes through the dataset as it is")
    loaders = [prepared(kind, rank, ranks) for rank in range(ranks)]
    epochs = [epoch(loaders) for _ in range(3)]
    for found in epochs:
        assert sorted(sum(found, [])) == list(range(SIZE))
        assert sum(found, []) != list(range(SIZE))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [epoch([prepared(kind, rank, ranks) for rank in range(ranks)])] == epochs[:1]
    assert epoch([prepared(kind, rank, ranks, seed=8) for rank in range(ranks)]) != epochs[0]
    for loader in loaders:
        loader.set_epoch(1)
    assert epoch(loaders) == epochs[1]
    assert epoch(loaders) == epochs[2]


def test_with_replacement_ranks_draw_alike() -> None:
    def made(rank: int, ranks: int) -> ShardedLoader:
        torch.manual_seed(rank)
        sampler = WeightedRandomSampler([1.0] * SIZE, SIZE)
        loader: DataLoader[Any] = DataLoader(range(SIZE), batch_size=1, sampler=sampler)  # type: ignore[arg-type]
        return prepare_data_loader(loader, rank=rank, ranks=ranks, seed=3, even_batches=False)

    (alone,) = epoch([made(0, 1)])
    assert len(set(alone)) < SIZE
    assert epoch([made(0, 2), made(1, 2)]) == [alone[::2], alone[1::2]]


def test_a_generator_of_the_users_is_the_seed() -> None:
    def made(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        loader: DataLoader[Any] = DataLoader(range(SIZE), batch_size=3, shuffle=True, generator=generator)  # type: ignore[arg-type]
        return epoch([prepare_data_loader(loader, rank=0, ranks=1)])

    assert made(4) == made(4) != made(5)


def test_an_iteration_that_is_left_is_an_epoch_as_well() -> None:
    loader, other = prepared("shuffle", 0, 1), prepared("shuffle", 0, 1)
    first = next(iter(loader)).tolist()
    assert first == next(iter(other)).tolist()
    assert next(iter(loader)).tolist() != first
    epoch([other])
    assert loader.epoch == other.epoch == 2


@pytest.mark.parametrize("kind", ["shuffle", "own", "own batches"])
def test_orders_take_nothing_from_the_random_numbers_of_training(kind: str) -> None:
    loader = prepared(kind, 0, 2)
    torch.manual_seed(0)
    random.seed(0)
    iterator = iter(loader)
    next(iterator)
    after = torch.rand(1), random.random()
    torch.manual_seed(0)
    random.seed(0)
    torch.empty((), dtype=torch.int64).random_()  # torch's own seed for workers
    assert after == (torch.rand(1), random.random())


def test_the_users_loader_is_left_alone() -> None:
    whole: DataLoader[Any] = DataLoader(range(SIZE), batch_size=3, shuffle=True)  # type: ignore[arg-type]
    before = dict(vars(whole)), whole.batch_sampler.sampler, whole.batch_sampler  # type: ignore[union-attr]
    list(prepare_data_loader(whole, rank=0, ranks=2, seed=1))
    assert before == (dict(vars(whole)), whole.batch_sampler.sampler, whole.batch_sampler)  # type: ignore[union-attr]


def test_persistent_workers_have_another_order_in_each_epoch() -> None:
    def made() -> list[ShardedLoader]:
        loaders = [DataLoader(Shuffled(), batch_size=3, num_workers=1, persistent_workers=True) for _ in range(2)]
        return [
            prepare_data_loader(loader, rank=rank, ranks=2, even_batches=False, dispatch_batches=False, seed=7)
            for rank, loader in enumerate(loaders)
        ]

    loaders = made()
    epochs = [epoch(loaders) for _ in range(3)]
    for found in epochs:
        assert sorted(sum(found, [])) == list(range(SIZE))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    fresh = made()
    for loader in fresh:
        loader.set_epoch(2)
    assert epoch(fresh) == epochs[2]
