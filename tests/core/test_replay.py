"""Iterators that are made once more give the batches, and draw the random numbers, of the one that was interrupted."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    get_worker_info,
)

from lightning_accel.core import replay, rng
from lightning_accel.core.data_position import order_of

SIZE = 23


class Numbers(Dataset[Tensor]):
    """Item i is i and, drawn in this process, two random numbers; it counts what was loaded."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.loaded = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        self.loaded += 1
        if get_worker_info() is not None:  # what workers draw is not exact
            return torch.tensor([index, 0.0, 0.0])
        return torch.tensor([index, torch.rand(()), random.random()])


class Stream(IterableDataset[Tensor]):
    """Shuffles within a buffer, with Python's random numbers, which nothing else draws from."""

    def __iter__(self) -> Iterator[Tensor]:
        buffer: list[int] = []
        for number in range(SIZE):
            buffer.append(number)
            if len(buffer) == 5:
                yield torch.tensor([buffer.pop(random.randrange(5))])
        yield from (torch.tensor([number]) for number in buffer)


class Jumbled(Sampler[list[int]]):
    """A batch sampler that draws an order at first and then the places in each batch."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SIZE)
        for batch in order.split(3):
            yield batch[torch.randperm(len(batch))].tolist()

    def __len__(self) -> int:
        return -(-SIZE // 3)


class Plain:
    """Anything that can be iterated over."""

    def __iter__(self) -> Iterator[float]:
        yield from range(SIZE)


class Watcher:
    """Makes the next iterator as it is told."""

    def __init__(self, beginning: replay.Beginning | None = None) -> None:
        self.beginning = beginning
        self.asked: list[int] = []

    def begin(self, loader: Any) -> replay.Beginning | None:
        beginning, self.beginning = self.beginning, None
        return beginning

    def draw(self, drawing: replay.Drawing) -> None:
        self.asked.append(drawing.drawn)


def distributed(**arguments: Any) -> DataLoader:
    return DataLoader(Numbers(), batch_size=3, sampler=DistributedSampler(range(SIZE), 2, 1, seed=3), **arguments)


def weighted() -> DataLoader:
    sampler = WeightedRandomSampler(torch.arange(1.0, SIZE + 1), SIZE, generator=torch.Generator().manual_seed(2))
    return DataLoader(Numbers(), batch_size=3, sampler=sampler)


def with_replacement() -> DataLoader:
    mine = torch.Generator().manual_seed(2)
    sampler = RandomSampler(range(SIZE), replacement=True, num_samples=90, generator=mine)
    return DataLoader(Numbers(), batch_size=3, sampler=sampler, generator=mine)


LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(Numbers(), batch_size=3),
    "shuffled": lambda: DataLoader(Numbers(), batch_size=3, shuffle=True),
    "single samples": lambda: DataLoader(Numbers(), batch_size=None, shuffle=True),
    "generator": lambda: DataLoader(Numbers(), 3, shuffle=True, generator=torch.Generator().manual_seed(4)),
    "weighted": weighted,
    "with replacement": with_replacement,
    "distributed": distributed,
    "own batches": lambda: DataLoader(Numbers(), batch_sampler=Jumbled()),
    "stream": lambda: DataLoader(Stream(), batch_size=3),
    "workers": lambda: DataLoader(Numbers(), 3, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(Numbers(), 3, shuffle=True, num_workers=2, persistent_workers=True),
    "workers on a stream": lambda: DataLoader(Stream(), batch_size=3, num_workers=1),
    "plain": Plain,
    "list": lambda: list(range(SIZE)),
}


def train(iterator: Iterator[Any], batches: int | None = None) -> list[Any]:
    """Batches, and what training draws after each of them."""
    seen = []
    while batches is None or len(seen) < batches:
        try:
            batch = next(iterator)
        except StopIteration:
            break
        seen.append((torch.as_tensor(batch).tolist(), torch.rand(()).item()))
    return seen


@pytest.mark.parametrize("done", [0, 1, 4, 100])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_rest_is_that_of_the_interrupted_run(kind: str, epoch: int, done: int) -> None:
    torch.manual_seed(5), random.seed(5)
    loader = replay.watch(LOADERS[kind](), Watcher())
    for _ in range(epoch):
        train(iter(loader))
        torch.rand(3)
    drawing = iter(loader)
    torch.rand(1)  # a hook between the making of the iterator and its first batch
    train(drawing, done)
    position, state = drawing.mark().position(), rng.collect()
    expected = train(drawing), train(iter(loader)), torch.rand(3).tolist()

    torch.manual_seed(6), random.seed(6)
    watcher = Watcher(replay.Beginning(rng.Stream(position["made"]), position))
    again = replay.watch(LOADERS[kind](), watcher)
    drawing = iter(again)
    rng.restore(state)
    drawing.go_live()
    assert (train(drawing), train(iter(again)), torch.rand(3).tolist()) == expected


def test_indices_are_skipped_and_no_sample_is_loaded() -> None:
    loader = replay.watch(distributed(), Watcher())
    drawing = iter(loader)
    train(drawing, 2)
    position = drawing.mark().position()
    again = replay.watch(distributed(), Watcher(replay.Beginning(rng.Stream(position["made"]), position)))
    iter(again)
    assert again.dataset.loaded == 0


def test_making_an_iterator_once_more_leaves_the_process_alone() -> None:
    loader = replay.watch(LOADERS["shuffled"](), Watcher())
    drawing = iter(loader)
    train(drawing, 2)
    position = drawing.mark().position()
    state = rng.collect()
    expected = torch.rand(3).tolist()
    rng.restore(state)
    again = replay.watch(LOADERS["shuffled"](), Watcher(replay.Beginning(rng.Stream(position["made"]), position)))
    early = iter(again)
    next(early)  # fetched ahead, by the run's random numbers
    assert torch.rand(3).tolist() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_other_ranks_go_on_from_a_place_in_the_order(workers: int) -> None:
    drawing = iter(replay.watch(distributed(), Watcher()))
    train(drawing, 2)
    position = drawing.mark().position()
    end = position["order"]["end"]
    assert end == 12
    order = order_of(DistributedSampler(range(SIZE), 2, 1, seed=3))
    rest = []
    for rank in range(3):
        loader = DataLoader(
            Numbers(), batch_size=2, sampler=DistributedSampler(range(SIZE), 3, rank, seed=3), num_workers=workers
        )
        watcher = Watcher(replay.Beginning(rng.Stream(position["made"]), position, start=end))
        drawing = iter(replay.watch(loader, watcher))
        drawing.go_live()
        mine = [batch[:, 0].int().tolist() for batch in drawing]
        assert drawing.mark().position()["order"] | {"start": end, "end": SIZE} == drawing.mark().position()["order"]
        assert [len(batch) for batch in mine] == [2, 2]
        rest += [batch[place] for place in range(2) for batch in mine]
        assert sum(map(len, iter(loader))) == 8  # the next epoch is as ever
    assert sorted(rest) == sorted([*order[12:], order[0]])


def test_a_watched_loader_is_what_it_was() -> None:
    class Mine(DataLoader):
        def extra(self) -> int:
            return 7

    loader = Mine(Numbers(), batch_size=3)
    watched = replay.watch(loader, Watcher())
    assert watched is loader
    assert isinstance(loader, Mine)
    assert type(loader).__name__ == "Mine"
    assert (len(loader), loader.extra(), loader.batch_size) == (8, 7, 3)
    assert len(iter(loader)) == 8
    assert isinstance(loader.batch_sampler, BatchSampler)
    replay.release(loader)
    assert type(loader) is Mine
    assert vars(loader).keys() == vars(Mine(Numbers(), batch_size=3)).keys()


def test_copies_and_pickles_are_not_watched() -> None:
    loader = replay.watch(LOADERS["in order"](), Watcher())
    for other in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert type(other) is DataLoader
        assert len(list(other)) == 8
    assert isinstance(iter(loader), replay.Drawing)


def test_an_iterator_that_somebody_else_makes_is_none_of_the_watchers_business() -> None:
    class Same(DataLoader):
        pass

    loader = replay.watch(Same(Numbers(), batch_size=3), Watcher())
    other = type(loader)(Numbers(), batch_size=3)  # as Lightning does to exchange the sampler
    assert len(list(other)) == 8
    assert not isinstance(iter(other), replay.Drawing)


class Slots:
    __slots__ = ("name",)

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize("original", [[0, 1, 2], (0, 1, 2), range(3), Slots()], ids=lambda x: type(x).__name__)
def test_what_cannot_be_given_another_class_has_a_stand_in(original: Any) -> None:
    watcher = Watcher()
    loader = replay.watch(original, watcher)
    assert list(loader) == [0, 1, 2]
    assert watcher.asked == [0, 1, 2, 3]
    if hasattr(original, "__len__"):
        assert len(loader) == 3
    else:
        pytest.raises(TypeError, len, loader)
    pytest.raises(AttributeError, lambda: loader.nothing)


def test_a_generator_is_drawn_from() -> None:
    position = replay.after(2, rng.collect())
    watcher = Watcher(replay.Beginning(rng.Stream(position["made"]), position))
    assert list(replay.watch(iter(range(5)), watcher)) == [2, 3, 4]


class Sequence:
    """The old way to be iterated over."""

    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise IndexError
        return index


def test_a_sequence_without_iter_has_a_stand_in() -> None:
    assert list(replay.watch(Sequence(), Watcher())) == [0, 1, 2]


def test_workers_can_be_made_beforehand() -> None:
    torch.manual_seed(0)
    loader = replay.watch(LOADERS["persistent workers"](), Watcher())
    replay.start_workers(loader)
    assert replay.has_workers(loader)
    made = loader._iterator
    expected = torch.rand(3).tolist()
    torch.manual_seed(0)
    assert torch.rand(3).tolist() == expected
    torch.manual_seed(0)
    seen = sorted(int(item) for batch in loader for item in batch[:, 0])
    assert seen == list(range(SIZE))
    assert loader._iterator is made
    none = replay.watch(LOADERS["in order"](), Watcher())
    replay.start_workers(none)
    assert not replay.has_workers(none)
