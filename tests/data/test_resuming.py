"""Loaders that go on where others were, with as many ranks or others; and those that skip."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from lightning_accel.core import rng
from lightning_accel.data import ShardedLoader, prepare_data_loader, skip_first_batches

SIZE = 26


class Noisy(Dataset[Any]):
    """Samples with random augmentation from all three sources."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return index, float(torch.rand(1)) + random.random() + np.random.rand()


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE))


class Own(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(SIZE), SIZE))

    def __len__(self) -> int:
        return SIZE


class OwnGenerator(Own):
    def __init__(self) -> None:
        self.random = random.Random(3)

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.sample(range(SIZE), SIZE))


def stateful(**kwargs: Any) -> DataLoader[Any]:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    loader: DataLoader[Any] = module.StatefulDataLoader(range(SIZE), shuffle=True, **kwargs)
    return loader


KINDS: dict[str, Any] = {
    "shuffle": lambda size: DataLoader(range(SIZE), batch_size=size, shuffle=True),  # type: ignore[arg-type]
    "own": lambda size: DataLoader(range(SIZE), batch_size=size, sampler=Own()),  # type: ignore[arg-type]
    "own generator": lambda size: DataLoader(range(SIZE), batch_size=size, sampler=OwnGenerator()),  # type: ignore[arg-type]
    "workers": lambda size: DataLoader(range(SIZE), batch_size=size, shuffle=True, num_workers=1),  # type: ignore[arg-type]
    "stream": lambda size: DataLoader(Stream(), batch_size=size),
    "stateful": lambda size: stateful(batch_size=size),
}


def prepared(kind: str, rank: int, ranks: int, size: int = 3, **kwargs: Any) -> ShardedLoader:
    return prepare_data_loader(KINDS[kind](size), rank=rank, ranks=ranks, **{"seed": 5, **kwargs})


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def rest(loader: ShardedLoader) -> list[list[int]]:
    return [torch.as_tensor(batch).tolist() for batch in loader]


def after(loader: ShardedLoader, batches: int) -> dict[str, Any]:
    """What a loader says within its loop after so many batches of its second epoch."""
    rest(loader)
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    return through_a_file(loader.state_dict())


QUICK = [kind for kind in KINDS if kind != "workers"]
"""Workers take a while to start."""
PLACES = [(kind, *place) for kind in QUICK for place in [(0, False), (1, False), (3, False), (5, False), (4, True)]]


@pytest.mark.parametrize(("kind", "batches", "split"), [*PLACES, ("workers", 3, False)])
def test_the_rest_of_an_epoch_and_the_next(kind: str, batches: int, split: bool) -> None:
    size = 4 if split else 3
    for rank in range(2):
        uninterrupted = prepared(kind, rank, 2, size, split_batches=split)
        rest(uninterrupted)
        expected = rest(uninterrupted)[batches:], rest(uninterrupted)
        state = after(prepared(kind, rank, 2, size, split_batches=split), batches)
        resumed = prepared(kind, rank, 2, size, split_batches=split, seed=99)
        resumed.load_state_dict(state)
        assert through_a_file(resumed.state_dict()).keys() == state.keys()
        assert (rest(resumed), rest(resumed)) == expected
        if batches == 5:
            assert expected[0] == []  # all were handed out


@pytest.mark.parametrize("kind", ["shuffle", "stateful", "stream"])
def test_twice_interrupted(kind: str) -> None:
    expected = rest(prepared(kind, 1, 2))
    first = prepared(kind, 1, 2)
    iterator = iter(first)
    found = [torch.as_tensor(next(iterator)).tolist()]
    for _ in range(3):
        other = prepared(kind, 1, 2)
        other.load_state_dict(through_a_file(first.state_dict()))
        again = prepared(kind, 1, 2)
        again.load_state_dict(through_a_file(other.state_dict()))  # before anything was taken
        iterator = iter(again)
        found.append(torch.as_tensor(next(iterator)).tolist())
        first = again
    assert found == expected[:4]


@pytest.mark.parametrize("kind", ["shuffle", "stateful", "own", "own generator"])
@pytest.mark.parametrize(("ranks", "size", "others", "other_size"), [(2, 3, 3, 3), (3, 2, 1, 2), (1, 4, 2, 3)])
def test_other_ranks_go_on_with_what_nobody_has_seen(
    kind: str, ranks: int, size: int, others: int, other_size: int
) -> None:
    loaders = [prepared(kind, rank, ranks, size) for rank in range(ranks)]
    seen: list[int] = []
    states = []
    for loader in loaders:
        iterator = iter(loader)
        seen += [index for _ in range(2) for index in torch.as_tensor(next(iterator)).tolist()]
        states.append(through_a_file(loader.state_dict()))
    found: list[int] = []
    for rank in range(others):
        resumed = prepared(kind, rank, others, other_size, seed=99, even_batches=False)
        resumed.load_state_dict(states[min(rank, ranks - 1)])
        found += sum(rest(resumed), [])
        assert resumed.epoch == 1
    assert Counter(seen + found) == Counter(range(SIZE))


def test_random_numbers_of_loading_and_of_training_go_on() -> None:
    """As in a loop that draws (dropout) and datasets that draw (augmentation), both from the process's numbers."""

    def loader() -> ShardedLoader:
        return prepare_data_loader(DataLoader(Noisy(), batch_size=3, shuffle=True), rank=0, ranks=2, seed=1)

    def steps(iterator: Iterator[Any], count: int) -> list[Any]:
        return [
            ([part.tolist() for part in next(iterator)], float(torch.rand(1)), random.random()) for _ in range(count)
        ]

    torch.manual_seed(0)
    whole = loader()
    iterator = iter(whole)
    steps(iterator, 2)
    state, numbers = through_a_file(whole.state_dict()), rng.collect()
    expected = steps(iterator, 3)
    torch.manual_seed(1)
    random.seed(1)
    resumed = loader()
    resumed.load_state_dict(state)
    rng.restore(numbers)
    assert steps(iter(resumed), 3) == expected


def test_a_state_between_epochs_is_the_next_one() -> None:
    loader = prepared("shuffle", 0, 2)
    first = rest(loader)
    resumed = prepared("shuffle", 0, 2, seed=6)
    resumed.load_state_dict(through_a_file(loader.state_dict()))
    second = rest(resumed)
    assert second == rest(loader) != first


def test_set_epoch_says_what_to_go_on_with() -> None:
    state = after(prepared("shuffle", 0, 2), 2)
    resumed, other = prepared("shuffle", 0, 2), prepared("shuffle", 0, 2)
    for loader, epoch in ((resumed, 1), (other, 4)):
        loader.load_state_dict(state)
        loader.set_epoch(epoch)
    assert len(rest(resumed)) == 3  # the rest of epoch 1
    assert len(rest(other)) == 5  # all of epoch 4
    assert (resumed.epoch, other.epoch) == (2, 5)


def test_bad_states() -> None:
    loader = prepared("stream", 0, 3)
    with pytest.raises(ValueError, match="of version 1, got None"):
        loader.load_state_dict({"_num_yielded": 3})
    with pytest.raises(ValueError, match="Expected 2 ranks, as when the state was saved, got 3"):
        loader.load_state_dict(after(prepared("stream", 0, 2), 2))


# -------------------------------------------------------------------- skipping


@pytest.mark.parametrize(("kind", "ranks"), [(kind, ranks) for kind in QUICK for ranks in (1, 2)] + [("workers", 2)])
def test_skipped_batches_do_not_come_again(kind: str, ranks: int) -> None:
    for rank in range(ranks):
        uninterrupted = prepared(kind, rank, ranks)
        epochs = [rest(uninterrupted) for _ in range(3)]
        loader = prepared(kind, rank, ranks)
        skipped = skip_first_batches(loader, 2)
        if kind != "stream":
            assert len(skipped) == len(loader) - 2
            assert len(skip_first_batches(skipped, 1)) == len(loader) - 3
        assert [torch.as_tensor(batch).tolist() for batch in skipped] == epochs[0][2:]
        assert rest(loader) == epochs[1]  # either goes on with the next epoch, all of it
        assert [torch.as_tensor(batch).tolist() for batch in skipped] == epochs[2]


def test_skipping_in_a_loader_that_nobody_has_prepared() -> None:
    whole: DataLoader[Any] = DataLoader(range(10), batch_size=3)  # type: ignore[arg-type]
    skipped = skip_first_batches(whole, 1)
    assert [batch.tolist() for batch in skipped] == [[3, 4, 5], [6, 7, 8], [9]]
    assert len(list(skipped)) == 4
    assert list(skip_first_batches(whole, 7)) == []
    assert isinstance(skipped, DataLoader)
    assert skipped.batch_size == 3


def test_a_state_after_skipping() -> None:
    loader = prepared("shuffle", 0, 2)
    expected = rest(prepared("shuffle", 0, 2))
    iterator = iter(skip_first_batches(loader, 2))
    next(iterator)
    resumed = prepared("shuffle", 0, 2)
    resumed.load_state_dict(through_a_file(loader.state_dict()))
    assert rest(resumed) == expected[3:]


@pytest.mark.parametrize("kind", ["shuffle", "own", "stateful", "stream"])
def test_skipping_what_a_state_has_skipped_already(kind: str) -> None:
    """As in a loop for Accelerate: it loads a state, and skips as many batches as that run had done."""
    for rank in range(2):
        expected = rest(prepared(kind, rank, 2))
        for done, skipped in [(2, 2), (3, 1), (1, 3), (2, 0)]:
            first = prepared(kind, rank, 2)
            iterator = iter(first)
            for _ in range(done):
                next(iterator)
            resumed = prepared(kind, rank, 2)
            resumed.load_state_dict(through_a_file(first.state_dict()))
            found = [torch.as_tensor(batch).tolist() for batch in skip_first_batches(resumed, skipped)]
            assert found == expected[max(done, skipped) :]


@pytest.mark.parametrize("kind", ["shuffle", "own", "stateful", "stream", "workers"])
def test_skipping_nothing_after_the_last_batch_of_an_epoch(kind: str) -> None:
    """Loops for Accelerate count that as the next epoch, which has nothing to skip: it must not be without a batch."""
    for rank in range(2):
        uninterrupted = prepared(kind, rank, 2)
        epochs = [rest(uninterrupted) for _ in range(3)]
        first = prepared(kind, rank, 2)
        iterator = iter(first)
        for _ in epochs[0]:
            next(iterator)
        resumed = prepared(kind, rank, 2)
        resumed.load_state_dict(through_a_file(first.state_dict()))
        found = [torch.as_tensor(batch).tolist() for batch in skip_first_batches(resumed, 0)]
        assert found == epochs[1]
        assert rest(resumed) == epochs[2]
        resumed.load_state_dict(through_a_file(first.state_dict()))
        assert list(skip_first_batches(resumed, len(epochs[0]))) == []  # who counts from that epoch's start
        assert rest(resumed) == epochs[1]


def test_skipping_less_than_nothing() -> None:
    with pytest.raises(ValueError, match="got -1"):
        skip_first_batches(prepared("shuffle", 0, 2), -1)
