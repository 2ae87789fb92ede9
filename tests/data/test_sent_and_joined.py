"""Ranks whose batches come from rank 0, and ranks that run out of batches: each as processes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from core.toys import EXACT, Net, adamw, build, mse, relative_error, values
from harness import Ranks
from lightning_accel.core import Engine
from lightning_accel.data import ShardedLoader, join_uneven_inputs, joined, prepare_data_loader
from rows import everyday

BATCH = 6
SOON_S = 30
ROWS = ["ddp", "zero1", "zero2", "fsdp", "fsdp_partial"]


class Stream(IterableDataset[int]):
    def __init__(self, length: int, fails_at: int = -1) -> None:
        self.length, self.fails_at = length, fails_at

    def __iter__(self) -> Iterator[int]:
        for index in range(self.length):
            if index == self.fails_at:
                raise ValueError("the disk is on fire")
            yield index


def collate(indices: list[int]) -> dict[str, Any]:
    """Tensors of some dtypes, one of them without samples; texts; a length that differs between batches."""
    numbers = torch.tensor(indices)
    return {
        "index": numbers,
        "image": numbers.reshape(-1, 1).repeat(1, 3).to(torch.bfloat16),
        "text": [str(index) for index in indices],
        "temperature": torch.tensor(0.5),
    }


def prepared(dataset: Any, rank: int | None = None, **kwargs: Any) -> ShardedLoader:
    """What this rank has of a loader; or what any rank would read by itself."""
    options = {name: kwargs.pop(name) for name in ("drop_last", "shuffle") if name in kwargs}
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=BATCH, collate_fn=collate, **options)
    mine = dist.get_rank() if rank is None else rank
    return prepare_data_loader(loader, rank=mine, ranks=dist.get_world_size(), **kwargs)


def seen(loader: ShardedLoader) -> list[Any]:
    """What comes, with what the loader says of it."""
    found = []
    for batch in loader:
        assert batch["image"].dtype is torch.bfloat16
        assert batch["image"].shape == (len(batch["index"]), 3)
        assert batch["image"][:, 0].tolist() == batch["index"].tolist()
        assert batch["text"] == [str(index) for index in batch["index"].tolist()]
        assert float(batch["temperature"]) == 0.5
        found.append((batch["index"].tolist(), loader.end_of_dataloader, loader.remainder))
    return found


# ---------------------------------------------------------------------- sent


def sent_and_read(lengths: list[int]) -> list[str]:
    """Cases in which what rank 0 sends is not what this rank would have read by itself."""
    wrong = []
    for length, drop_last, even, split in product(lengths, (False, True), (True, False), (False, True)):
        options = {"drop_last": drop_last, "even_batches": even, "split_batches": split}
        own = seen(prepared(range(length), dispatch_batches=False, **options))
        rank_0s: Any = Stream(length) if dist.get_rank() == 0 else Stream(0)  # nobody else looks at the data
        found = {
            "stream": seen(prepared(rank_0s, **options)),
            "map": seen(prepared(range(length), dispatch_batches=True, **options)),
        }
        for kind, what in found.items():
            if what != own:
                wrong.append(f"{kind} of {length}, {options}: {what} instead of {own}")
    return wrong


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.matrix)], indirect=True)
def test_what_is_sent_is_what_each_rank_would_have_read(world: Ranks) -> None:
    lengths = [0, 1, 12, 14] if world.world_size == 2 else list(range(40))
    for wrong in world.run(sent_and_read, lengths):
        assert wrong == []


def ragged() -> list[list[int]]:
    """Batches that differ in size, which cannot be put together."""

    def padded(indices: list[int]) -> Tensor:
        return torch.full((len(indices), max(indices) + 1), len(indices))

    loader: DataLoader[Any] = DataLoader(Stream(12), batch_size=3, collate_fn=padded)
    made = prepare_data_loader(loader, rank=dist.get_rank(), ranks=dist.get_world_size())
    return [list(batch.shape) for batch in made]


def test_batches_of_differing_shapes_are_sent(ranks2: Ranks) -> None:
    assert ranks2.run(ragged) == [[[3, 3], [3, 9]], [[3, 6], [3, 12]]]


def without_samples(drop_last: bool) -> list[str]:
    """Batches of which nobody can tell how many samples they have."""
    loader: DataLoader[Any] = DataLoader(
        Stream(15), batch_size=3, collate_fn=lambda indices: {"text": str(indices)}, drop_last=drop_last
    )
    made = prepare_data_loader(loader, rank=dist.get_rank(), ranks=dist.get_world_size(), even_batches=drop_last)
    return [batch["text"] for batch in made]


def test_what_is_not_filled_up_is_not_counted(ranks2: Ranks) -> None:
    short, full = ranks2.run(without_samples, False), ranks2.run(without_samples, True)
    assert [len(batches) for batches in short] == [3, 2]
    assert short[0][2] == "[12, 13, 14]"
    assert [len(batches) for batches in full] == [2, 2]


def fails_on_rank_0() -> str:
    try:
        for _ in prepared(Stream(30, fails_at=20)):
            pass
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_what_fails_on_rank_0_fails_on_all(ranks2: Ranks) -> None:
    begin = time.monotonic()
    first, second = ranks2.run(fails_on_rank_0)
    assert first == "ValueError: the disk is on fire"
    assert "rank 0, which loads the batches of all ranks, has failed: ValueError: the disk is on fire" in second
    assert time.monotonic() - begin < SOON_S


def sent_on(shuffle: bool) -> tuple[list[Any], list[Any], list[Any]]:
    """The rest of an epoch and the next one, of a loader that was not interrupted, of another, and a skipped one."""

    def made() -> ShardedLoader:
        if shuffle:
            return prepared(range(50), dispatch_batches=True, seed=3, shuffle=True)
        return prepared(Stream(50))

    def indices(iterator: Any) -> list[Any]:
        return [batch["index"].tolist() for batch in iterator]

    whole = made()
    iterator = iter(whole)
    for _ in range(2):
        next(iterator)
    state = whole.state_dict()
    expected = indices(iterator), indices(whole)
    resumed = made()
    resumed.load_state_dict(state)
    skipped = made()
    return [*expected], [indices(resumed), indices(resumed)], [indices(skipped.after(2)), indices(skipped)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_is_sent_goes_on_where_it_was(ranks2: Ranks, shuffle: bool) -> None:
    for expected, resumed, skipped in ranks2.run(sent_on, shuffle):
        assert resumed == expected
        assert skipped == expected
        assert len(expected[0]) == 3


def agreed() -> list[list[int]]:
    torch.manual_seed(dist.get_rank())
    loader: DataLoader[Any] = DataLoader(range(8), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    made = prepare_data_loader(loader, rank=dist.get_rank(), ranks=2)
    return [[index for batch in made for index in batch.tolist()] for _ in range(2)]


def test_without_a_seed_ranks_agree_on_one(ranks2: Ranks) -> None:
    first, second = ranks2.run(agreed)
    for epoch in range(2):
        assert sorted(first[epoch] + second[epoch]) == list(range(8))
    assert first[0] != first[1]


class OwnOrder(Sampler[int]):
    def __init__(self) -> None:
        self.generator = np.random.default_rng()  # other numbers on each rank

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.permutation(8).tolist())

    def __len__(self) -> int:
        return 8


def of_own_order() -> list[list[int]]:
    loader: DataLoader[Any] = DataLoader(range(8), batch_size=2, sampler=OwnOrder())  # type: ignore[arg-type]
    made = prepare_data_loader(loader, rank=dist.get_rank(), ranks=2)
    return [[index for batch in made for index in batch.tolist()] for _ in range(2)]


def test_generators_of_samplers_are_those_of_rank_0(ranks2: Ranks) -> None:
    first, second = ranks2.run(of_own_order)
    for epoch in range(2):
        assert sorted(first[epoch] + second[epoch]) == list(range(8))
    assert first[0] != first[1]


def of_other_length(batch_size: int) -> None:
    rank = dist.get_rank()
    loader: DataLoader[Any] = DataLoader(range(8 + rank), batch_size=2 + rank * batch_size)  # type: ignore[arg-type]
    prepare_data_loader(loader, rank=rank, ranks=2)


def test_datasets_of_different_lengths(ranks2: Ranks) -> None:
    for error in ranks2.run_expecting_error(of_other_length, 0):
        assert error is not None
        assert "Expected a dataset of the same length on every rank, got [8, 9] by rank." in error[1]


# --------------------------------------------------------------------- joined


def batches_of(rank: int, counts: list[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(10 + rank)

    def one(size: int) -> Tensor:
        return torch.randn(2, size, generator=generator, dtype=torch.float64)

    return [(one(7), one(3)) for _ in range(counts[rank])]


def alone(counts: list[int]) -> nn.Module:
    """A single process: each step's loss is the mean over the ranks that still have a batch."""
    module = build(Net)
    optimizer = adamw(module.parameters())
    everyone = [batches_of(rank, counts) for rank in range(len(counts))]
    for step in range(max(counts)):
        losses = [mse(module, *batches[step]) for batches in everyone if step < len(batches)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
    return module


def joined_error(row: str, counts: list[int], weighted: bool = False) -> tuple[float, list[bool], int]:
    """How far a joined loop is from the single process; which of this rank's batches stand in; its length."""
    rank = dist.get_rank()
    module = build(Net)
    engine = Engine(module, row)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    loop = joined(batches_of(rank, counts), module)
    shadows = []
    for x, y in loop:
        shadows.append(loop.is_shadow)
        optimizer.zero_grad()
        with engine.forward_context():
            loss = mse(module, x, y)
        if loop.is_shadow:
            loss = loss * float("nan")
        if weighted:
            engine.set_loss_weight(len(x))
        engine.backward(loss)
        engine.clip_grad_norm_(optimizer, 0.5)
        optimizer.step()
    assert engine.share is None
    error = relative_error(values(engine), alone(counts).parameters())
    engine.close()
    return error, shadows, len(loop)


@pytest.mark.parametrize("row", everyday(ROWS))
def test_ranks_that_run_out_stand_in(ranks2: Ranks, row: str) -> None:
    (first, shadows, length), (second, others, _) = ranks2.run(joined_error, row, [3, 5])
    assert max(first, second) < EXACT
    assert shadows == [False] * 3 + [True] * 2
    assert others == [False] * 5
    assert length == 5


def test_a_rank_without_any_batch_is_lent_one(ranks2: Ranks) -> None:
    (first, shadows, _), (second, _, _) = ranks2.run(joined_error, "zero2", [0, 2])
    assert max(first, second) < EXACT
    assert shadows == [True] * 2


@pytest.mark.matrix
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("counts", [[4, 2, 1], [0, 3, 0], [0, 0, 0]])
@pytest.mark.parametrize("weighted", [False, True])
def test_three_ranks_that_run_out(ranks3: Ranks, row: str, counts: list[int], weighted: bool) -> None:
    for error, shadows, _ in ranks3.run(joined_error, row, counts, weighted):
        assert error < EXACT
        assert len(shadows) == max(counts)


def of_a_prepared_loader(sent: bool) -> list[Any]:
    engine = Engine(build(Net), "zero2")
    loader = prepared(range(20), dispatch_batches=sent)
    found = []
    with join_uneven_inputs([engine], [loader], even_batches=False):
        for batch in loader:
            found.append((batch["index"].tolist(), loader.is_shadow, loader.end_of_dataloader))
    assert loader.even_batches
    assert loader.joining is None
    engine.close()
    return found


@pytest.mark.parametrize("sent", [False, True])
def test_a_prepared_loader_ends_on_all_ranks_at_once(ranks2: Ranks, sent: bool) -> None:
    first, second = ranks2.run(of_a_prepared_loader, sent)
    assert [batch for batch, _, _ in first] == [[*range(6)], [*range(12, 18)]]
    assert [batch for batch, _, _ in second] == [[*range(6, 12)], [18, 19]]
    first, second = ranks2.run(of_an_odd_one, sent)
    assert first == [([*range(6)], False, False), ([12, 13], False, True)]
    assert second == [([*range(6, 12)], False, False), ([*range(6, 12)], True, True)]


def of_an_odd_one(sent: bool) -> list[Any]:
    loader = prepared(range(14), dispatch_batches=sent)
    with join_uneven_inputs([], [loader], even_batches=False):
        return [(b["index"].tolist(), loader.is_shadow, loader.end_of_dataloader) for b in loader]


def fails_within() -> str:
    def batches() -> Iterator[int]:
        yield 0
        if dist.get_rank() == 1:
            raise ValueError("no more memory cards")
        yield 1

    try:
        for _ in joined(batches()):
            pass
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_rank_that_fails_in_a_joined_loop_is_named(ranks2: Ranks) -> None:
    first, second = ranks2.run(fails_within)
    assert second == "ValueError: no more memory cards"
    assert first.startswith("RuntimeError: rank 1 has failed to load a batch of a joined loop")


def test_alone_a_joined_loop_is_the_loop() -> None:
    loop = joined([1, 2, 3])
    assert list(loop) == [1, 2, 3]
    assert (len(loop), loop.is_shadow) == (3, False)
    with pytest.raises(ValueError, match="Expected models that an engine trains, got a Linear that none does"):
        joined([1], nn.Linear(1, 1))


def one_in_another() -> tuple[list[float | None], float | None, str]:
    """Shares within a loop that another one within it must not change, and what two that take turns raise."""
    rank = dist.get_rank()
    module = build(Net)
    engine = Engine(module, "ddp")
    shares = []
    for _ in joined([0] * (1 + rank), module):
        assert list(joined([1, 2], module)) == [1, 2]
        shares.append(engine.share)
    error = ""
    try:
        for _ in zip(joined([0] * (2 + rank), module), joined([1, 2, 3], module), strict=True):
            pass
    except ValueError as raised:
        error = str(raised)
    share = engine.share
    engine.close()
    return shares, share, error


def test_loops_within_one_another_and_in_turns(ranks2: Ranks) -> None:
    for rank, (shares, share, error) in enumerate(ranks2.run(one_in_another)):
        assert shares == [1.0, [0.0, 2.0][rank]]
        assert share is None
        assert error.startswith("Expected one joined loop at a time for a model")


def test_all_samples_of_a_joined_epoch_come_once(ranks2: Ranks) -> None:
    counts: Counter[int] = Counter()
    for found in ranks2.run(of_an_odd_one, False):
        counts.update(index for batch, is_shadow, _ in found if not is_shadow for index in batch)
    assert counts == Counter(range(14))
