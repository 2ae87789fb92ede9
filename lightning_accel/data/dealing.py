"""How batches are dealt to ranks: arithmetic on indices, nothing is loaded.

[Note: dealing]
A loader makes global batches of b samples. They are dealt in turns, or each is split. Ten samples, b = 3, two ranks::

    in turns     rank 0   0 1 2   6 7 8          split (b = 4)   rank 0   0 1   4 5   8 9
                 rank 1   3 4 5   9 | 0 1                        rank 1   2 3   6 7   | 0 1

A round is what the ranks get together while each gets one batch: b · N samples in turns, b if batches are split. The
last round may be incomplete. Then, in this order of precedence:

    drop_last       nobody gets it
    even_batches    it is completed with samples from the start of the epoch (right of the bars): all ranks have equally
                    many batches of the same size
    otherwise       the ranks get what there is, some of them a shorter batch, some none

So in the order of ranks all real samples of the last round come first, and the rest of it is duplicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any, TypeVar

from torch.utils.data import BatchSampler, IterableDataset, get_worker_info
from typing_extensions import override

T = TypeVar("T")
Steady = Callable[[], Callable[[Callable[[], Any]], Any]]
"""Makes, for one pass, what calls a function that may draw random numbers, so that all ranks draw the same."""


def deal(
    batches: Iterable[T],
    *,
    ranks: int,
    batch_size: int | None,
    split: bool,
    drop_last: bool,
) -> Iterator[tuple[list[T], bool]]:
    """Put global batches together in rounds.

    Args:
        batches: The global batches.
        ranks: How many ranks share them.
        batch_size: Samples of a whole one; None if they differ, so that none is short.
        split: Whether each batch is a round.
        drop_last: Leave an incomplete round out.

    Yields:
        The batches of a round, and whether it is complete. Only the last may be incomplete.

    Raises:
        ValueError: If batches are to be split and one before the last is short.

    """
    most = 1 if split else ranks
    held: list[T] = []

    def short(batch: Any) -> bool:
        return batch_size is not None and len(batch) < batch_size

    for batch in batches:
        if len(held) == most:
            if split and short(held[-1]):
                raise ValueError(
                    f"Expected batches of {batch_size} samples to split, but one before the last has"
                    f" {len(held[-1])}. Use split_batches=False."  # type: ignore[arg-type]
                )
            yield held, True
            held = []
        held.append(batch)
    if held:
        complete = len(held) == most and not short(held[-1])
        if complete or not drop_last:
            yield held, complete


def completed(batches: Sequence[list[T]], first: Sequence[T], size: int, most: int) -> list[list[T]]:
    """An incomplete round with samples from the start of the epoch.

    Args:
        batches: What there is of the round.
        first: The first samples of the epoch, at least one; begun anew where they are too few.
        size: Samples of a whole batch.
        most: Batches of a complete round.

    """
    more = cycle(first)
    whole = [[*batch, *islice(more, size - len(batch))] for batch in batches]
    return whole + [list(islice(more, size)) for _ in range(most - len(batches))]


def require_divisible(batch_size: int | None, ranks: int) -> None:
    """Raise if batches of this size cannot be split.

    Raises:
        ValueError: If the ranks would get different numbers of samples.

    """
    if batch_size is None or batch_size % ranks:
        raise ValueError(
            f"Expected a batch size that {ranks} ranks can divide evenly for split_batches=True, got {batch_size}. Use"
            f" a multiple of {ranks}, or split_batches=False, which deals whole batches to the ranks in turns."
        )


class ShardedBatches(BatchSampler):
    """One rank's batches of indices. See [Note: dealing].

    Args:
        source: The global batch sampler; or, if ``batched`` is False, a sampler of single indices, dealt one by one.
        rank: Which rank.
        ranks: Of how many.
        split_batches: Split each batch instead of dealing whole ones in turns.
        even_batches: Complete the last round with samples from the start.
        takes_in_order: Whether ``source`` just takes its sampler's indices, ``batch_size`` at a time.
        batched: Whether ``source`` gives batches.
        steady: Has all ranks draw the same order from random numbers. None: they do by themselves.

    """

    def __init__(
        self,
        source: Any,
        *,
        rank: int,
        ranks: int,
        split_batches: bool = False,
        even_batches: bool = True,
        takes_in_order: bool = False,
        batched: bool = True,
        steady: Steady | None = None,
    ) -> None:
        size = getattr(source, "batch_size", None) if batched else None
        if split_batches:
            require_divisible(size, ranks)
        self.source = source
        self.rank, self.ranks = rank, ranks
        self.split_batches = split_batches
        self.even_batches = even_batches and ranks > 1  # alone, a rank's last batch is as short as any loader's
        self.drop_last = bool(getattr(source, "drop_last", False))
        self.global_batch_size: int | None = size
        """Samples of a global batch; None if batches differ."""
        self.batch_size = size // ranks if split_batches and size is not None else size  # type: ignore[assignment]
        self.start = 0
        """Where the next pass begins: after so many samples of the epoch's order (batches, if they differ)."""
        self.remainder = -1
        """Of the pass that has come to its end: samples of the last round that are no duplicates; -1 if all are."""
        self._in_order = takes_in_order
        self._batched = batched
        self._steady = steady

    @property
    def sampler(self) -> Any:  # type: ignore[override]
        """What the global batches take their indices from."""
        return getattr(self.source, "sampler", self.source)

    @property
    def per_round(self) -> int:
        """Samples of a complete round; batches, if they differ in size. What ``start`` counts."""
        most = 1 if self.split_batches else self.ranks
        return most * (self.global_batch_size or 1) if self._counts_samples else most

    @property
    def _counts_samples(self) -> bool:
        return self._in_order and self.global_batch_size is not None

    def set_epoch(self, epoch: int) -> None:
        """Tell the samplers which epoch comes."""
        for sampler in (self.source, self.sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    @override
    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        total, size = len(self.source), self.global_batch_size
        if not self.split_batches:
            whole, rest = divmod(total, self.ranks)
            if self.drop_last or not rest:
                return whole
            return whole + (self.even_batches or self.rank < rest)
        if self.drop_last or self.even_batches or not self._counts_samples:
            return total
        assert size is not None
        last = len(self.sampler) % size
        return total - (0 < last <= self.rank * (size // self.ranks))

    @override
    def __iter__(self) -> Iterator[Any]:
        self.remainder = -1
        first: list[Any] = []
        size, most = self.global_batch_size, 1 if self.split_batches else self.ranks
        rounds = deal(
            self._batches(first), ranks=self.ranks, batch_size=size, split=self.split_batches, drop_last=self.drop_last
        )
        for batches, complete in rounds:
            whole = batches
            if not complete:
                self.remainder = sum(map(len, batches)) if self._batched else len(batches)
                if self.even_batches and size is not None:
                    whole = completed(batches, first, size, most)
                elif self.even_batches:
                    whole = [*batches, *islice(cycle(first), most - len(batches))]
            mine = self._mine(whole)
            if mine is not None:
                yield mine

    def _mine(self, batches: list[Any]) -> Any:
        """This rank's part of a round; None if there is none."""
        if not self.split_batches:
            return batches[self.rank] if self.rank < len(batches) else None
        assert self.batch_size is not None
        return batches[0][self.rank * self.batch_size : (self.rank + 1) * self.batch_size] or None

    def _batches(self, first: list[Any]) -> Iterator[Any]:
        """The global batches from ``start`` on; what the epoch begins with is added to ``first``."""
        take = (lambda function: function()) if self._steady is None else self._steady()
        start, size = self.start, self.global_batch_size
        if not self._counts_samples:
            source: Iterator[Any] = take(lambda: iter(self.source))
            number, end = 0, object()
            while (batch := take(lambda: next(source, end))) is not end:
                batch = list(batch) if self._batched else batch
                if size is None and number < self.ranks:
                    first.append(batch)
                elif size is not None and number < self.ranks:
                    first.extend(batch)
                if number >= start:
                    yield batch
                number += 1
            return
        assert size is not None
        order: Iterator[Any] = take(lambda: iter(self.sampler))
        head = take(lambda: list(islice(order, start)))
        first.extend(head[: self.per_round])
        del head
        while batch := take(lambda: list(islice(order, size))):
            first.extend(batch[: self.per_round - len(first)])
            if len(batch) < size and self.drop_last:
                return
            yield batch


class ShardedStream(IterableDataset[Any]):
    """One rank's samples of an iterable dataset that every rank goes through. See [Note: dealing].

    Args:
        dataset: The whole one. It must give the same samples on every rank.
        rank: Which rank.
        ranks: Of how many.
        batch_size: Samples of a global batch; 1 if they are dealt one by one.
        split_batches: Split each batch instead of dealing whole ones in turns.
        even_batches: Complete the last round with samples from the start.
        drop_last: Leave an incomplete round out.
        steady: Has all ranks draw the same random numbers in going through the dataset.

    """

    def __init__(
        self,
        dataset: Any,
        *,
        rank: int,
        ranks: int,
        batch_size: int,
        split_batches: bool = False,
        even_batches: bool = True,
        drop_last: bool = False,
        steady: Steady | None = None,
    ) -> None:
        if split_batches:
            require_divisible(batch_size, ranks)
        self.dataset = dataset
        self.rank, self.ranks = rank, ranks
        self.batch_size, self.drop_last = batch_size, drop_last
        self.even_batches = even_batches and ranks > 1
        self.per_round = batch_size if split_batches else batch_size * ranks
        """Samples of a complete round."""
        self.remainder = -1
        """As for ``ShardedBatches``; known in this process only, not from a loader's workers."""
        self._own = self.per_round // ranks
        self._steady = steady

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset which epoch comes."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch."""
        whole, rest = divmod(len(self.dataset), self.per_round)
        if rest and not self.drop_last:
            last = self._own if self.even_batches else min(self._own, max(0, rest - self.rank * self._own))
            return whole * self._own + last
        return whole * self._own

    @override
    def __iter__(self) -> Iterator[Any]:
        self.remainder = -1
        take = (lambda function: function()) if self._steady is None else self._steady()
        mine = slice(self.rank * self._own, (self.rank + 1) * self._own)
        samples: Iterator[Any] = take(lambda: iter(self.dataset))
        first: list[Any] = []
        while batch := take(lambda: list(islice(samples, self.per_round))):
            first = first or batch
            if len(batch) < self.per_round:
                if self.drop_last:
                    return
                if get_worker_info() is None:
                    self.remainder = len(batch)
                if self.even_batches:
                    batch = [*batch, *islice(cycle(first), self.per_round - len(batch))]
            yield from batch[mine]
