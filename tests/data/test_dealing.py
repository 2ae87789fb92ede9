"""Which samples each rank sees: literal tables, a rule for all small cases, and Accelerate's own shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice, product
from typing import Any

import pytest
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SequentialSampler

from lightning_accel.data import ShardedLoader, prepare_data_loader
from lightning_accel.data.dealing import ShardedBatches

Batches = list[list[int]]

BATCH = 3
CASES = [
    (length, ranks, drop_last, even, split)
    for length, ranks, drop_last, even, split in product(range(26), (2, 3), (False, True), (True, False), (False, True))
    if not (split and BATCH % ranks)
]


class Stream(IterableDataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.length


def loaders(dataset: Any, ranks: int, drop_last: bool, even: bool, split: bool, **kwargs: Any) -> list[ShardedLoader]:
    whole: DataLoader[Any] = DataLoader(dataset, batch_size=BATCH, drop_last=drop_last, **kwargs)
    return [
        prepare_data_loader(whole, rank=rank, ranks=ranks, split_batches=split, even_batches=even, seed=1)
        for rank in range(ranks)
    ]


def seen(loader: ShardedLoader) -> Batches:
    return [batch.tolist() for batch in loader]


def rule(length: int, ranks: int, drop_last: bool, even: bool, split: bool) -> list[Batches]:
    """By rank. A round of samples is cut in as many pieces as there are ranks."""
    size = BATCH if split else BATCH * ranks
    own = size // ranks
    found: list[Batches] = [[] for _ in range(ranks)]
    for start in range(0, length, size):
        block = list(range(start, min(start + size, length)))
        if len(block) < size and drop_last:
            continue
        if even:
            block += islice(cycle(range(min(length, size))), size - len(block))
        for rank in range(ranks):
            if piece := block[rank * own : (rank + 1) * own]:
                found[rank].append(piece)
    return found


# length, ranks, drop_last, even, split -> the batches of each rank
TABLE: list[tuple[tuple[int, int, bool, bool, bool], list[Batches]]] = [
    ((12, 2, False, True, False), [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]),
    ((10, 2, False, True, False), [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 0, 1]]]),
    ((10, 2, False, False, False), [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9]]]),
    ((10, 2, True, True, False), [[[0, 1, 2]], [[3, 4, 5]]]),
    ((10, 2, True, False, False), [[[0, 1, 2]], [[3, 4, 5]]]),
    ((7, 2, False, True, False), [[[0, 1, 2], [6, 0, 1]], [[3, 4, 5], [2, 3, 4]]]),
    ((7, 2, False, False, False), [[[0, 1, 2], [6]], [[3, 4, 5]]]),
    ((2, 2, False, True, False), [[[0, 1, 0]], [[1, 0, 1]]]),
    ((2, 2, False, False, False), [[[0, 1]], []]),
    ((2, 2, True, True, False), [[], []]),
    ((0, 3, False, True, False), [[], [], []]),
    ((1, 3, False, True, False), [[[0, 0, 0]], [[0, 0, 0]], [[0, 0, 0]]]),
    (
        (14, 3, False, True, False),
        [[[0, 1, 2], [9, 10, 11]], [[3, 4, 5], [12, 13, 0]], [[6, 7, 8], [1, 2, 3]]],
    ),
    ((14, 3, False, False, False), [[[0, 1, 2], [9, 10, 11]], [[3, 4, 5], [12, 13]], [[6, 7, 8]]]),
    ((8, 3, False, True, True), [[[0], [3], [6]], [[1], [4], [7]], [[2], [5], [0]]]),
    ((8, 3, False, False, True), [[[0], [3], [6]], [[1], [4], [7]], [[2], [5]]]),
    ((8, 3, True, True, True), [[[0], [3]], [[1], [4]], [[2], [5]]]),
    ((1, 3, False, True, True), [[[0]], [[0]], [[0]]]),
]


@pytest.mark.parametrize(("case", "expected"), TABLE)
@pytest.mark.parametrize("dataset", [range, Stream])
def test_the_samples_of_each_rank(dataset: Any, case: tuple[int, Any, Any, Any, Any], expected: list[Batches]) -> None:
    length, *options = case
    assert [seen(loader) for loader in loaders(dataset(length), *options)] == expected


@pytest.mark.parametrize("dataset", [range, pytest.param(SizedStream, marks=pytest.mark.matrix)])
def test_all_small_cases(dataset: Any) -> None:
    for length, ranks, drop_last, even, split in CASES:
        case = length, ranks, drop_last, even, split
        made = loaders(dataset(length), ranks, drop_last, even, split)
        found = [seen(loader) for loader in made]
        assert found == rule(*case), case
        assert [len(loader) for loader in made] == [len(batches) for batches in found], case
        assert len({loader.total_batch_size for loader in made} - {BATCH if split else BATCH * ranks}) == 0

        counts = Counter(index for batches in found for batch in batches for index in batch)
        size = BATCH if split else BATCH * ranks
        if not drop_last:
            assert set(counts) == set(range(length)), case
        if even:
            assert len({len(batches) for batches in found}) == 1, case
            own = BATCH // ranks if split else BATCH
            assert all(len(batch) == own for batches in found for batch in batches), case
            missing = -length % size
            repeated = {index for index, count in counts.items() if count > 1}
            if drop_last:
                assert not repeated, case
            elif length >= size:
                assert repeated == set(range(missing)), case
        else:
            assert all(count == 1 for count in counts.values()), case


@pytest.mark.parametrize("dataset", [range, Stream])
@pytest.mark.parametrize("split", [False, True])
def test_the_last_batch_is_known_as_such(dataset: Any, split: bool) -> None:
    size = BATCH if split else BATCH * 3
    for length in range(26):
        for loader in loaders(dataset(length), 3, False, True, split):
            told = [(loader.end_of_dataloader, loader.remainder) for _ in loader]
            last = [(True, length % size or -1)] if length else []
            assert told == [(False, -1)] * (len(told) - 1) + last
            assert (loader.end_of_dataloader, loader.remainder) == (False, -1)


def test_the_remainder_is_the_real_samples_in_the_order_of_ranks() -> None:
    for length in range(1, 26):
        made = loaders(range(length), 2, False, True, False)
        rounds: list[list[int]] = []
        for batches in zip(*made, strict=True):
            together = [index for batch in batches for index in batch.tolist()]
            remainder = made[0].remainder
            assert remainder == made[1].remainder
            rounds.append(together if remainder < 0 else together[:remainder])
        assert sum(rounds, []) == list(range(length))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("even", [False, True])
def test_alone_a_rank_has_the_loader_as_it_was(drop_last: bool, even: bool) -> None:
    for length in range(10):
        whole: DataLoader[Any] = DataLoader(range(length), batch_size=BATCH, drop_last=drop_last)  # type: ignore[arg-type]
        (loader,) = loaders(range(length), 1, drop_last, even, False)
        assert seen(loader) == [batch.tolist() for batch in whole]
        assert len(loader) == len(whole)


class Buckets(Sampler[list[int]]):
    """Batches of differing sizes."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0], [1, 2], [3, 4, 5], [6], [7, 8]])

    def __len__(self) -> int:
        return 5


@pytest.mark.parametrize(
    ("even", "expected"),
    [
        (True, [[[0], [3, 4, 5], [7, 8]], [[1, 2], [6], [0]]]),
        (False, [[[0], [3, 4, 5], [7, 8]], [[1, 2], [6]]]),
    ],
)
def test_batches_of_differing_sizes_are_dealt_whole(even: bool, expected: list[Batches]) -> None:
    shards = [ShardedBatches(Buckets(), rank=rank, ranks=2, even_batches=even) for rank in range(2)]
    assert [list(shard) for shard in shards] == expected
    assert [len(shard) for shard in shards] == [len(batches) for batches in expected]


def test_single_samples_are_dealt_in_turns() -> None:
    whole: DataLoader[Any] = DataLoader(range(5), batch_size=None)  # type: ignore[arg-type]
    made = [prepare_data_loader(whole, rank=rank, ranks=2) for rank in range(2)]
    assert [list(loader) for loader in made] == [[0, 2, 4], [1, 3, 0]]


def test_a_batch_sampler_as_sampler() -> None:
    class Rows:
        def __getitem__(self, indices: list[int]) -> list[int]:
            return [10 * index for index in indices]

        def __len__(self) -> int:
            return 7

    sampler = BatchSampler(SequentialSampler(range(7)), 3, False)
    whole: DataLoader[Any] = DataLoader(Rows(), batch_size=None, sampler=sampler)  # type: ignore[arg-type]
    made = [prepare_data_loader(whole, rank=rank, ranks=2) for rank in range(2)]
    assert [[list(map(int, batch)) for batch in loader] for loader in made] == [
        [[0, 10, 20], [60, 0, 10]],
        [[30, 40, 50], [20, 30, 40]],
    ]


def test_batches_that_ranks_cannot_share_evenly_are_not_split() -> None:
    with pytest.raises(ValueError, match=r"a batch size that 2 ranks can divide evenly .* got 3"):
        loaders(range(10), 2, False, True, True)
    with pytest.raises(ValueError, match=r"a batch size that 2 ranks can divide evenly .* got None"):
        ShardedBatches(Buckets(), rank=0, ranks=2, split_batches=True)


def test_accelerates_own_shards() -> None:
    """The same samples in all cases; with IterableDatasetShard where that has the choice."""
    theirs = pytest.importorskip("accelerate.data_loader")
    for length, ranks, drop_last, even, split in CASES:
        case = length, ranks, drop_last, even, split
        found = [seen(loader) for loader in loaders(range(length), ranks, drop_last, even, split)]
        source = BatchSampler(SequentialSampler(range(length)), BATCH, drop_last)
        options = {"split_batches": split, "even_batches": even}
        shards = [theirs.BatchSamplerShard(source, ranks, rank, **options) for rank in range(ranks)]
        assert found == [[list(batch) for batch in shard] for shard in shards], case
        if even:
            streams = [
                theirs.IterableDatasetShard(Stream(length), BATCH, drop_last, ranks, rank, split)
                for rank in range(ranks)
            ]
            flat = [[index for batch in batches for index in batch] for batches in found]
            assert flat == [list(stream) for stream in streams], case


def test_several_workers_do_not_say_what_is_no_duplicate() -> None:
    """Each completes rounds of its own: with one remainder for all, real samples would be left out."""
    (loader, _) = loaders(SizedStream(14), 2, False, True, False, num_workers=2)
    remainders: list[int] = []
    with pytest.warns(UserWarning, match="each of 2 workers"):
        remainders += [loader.remainder for _ in loader]
    assert set(remainders) == {-1}
