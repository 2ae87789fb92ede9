"""One epoch's batches of one rank: read by itself, or sent by rank 0."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle, islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_accel.core import rng
from lightning_accel.core.data_position import generators_of, set_generators
from lightning_accel.data.batches import joined_samples, samples, samples_of
from lightning_accel.data.dealing import ShardedBatches, ShardedStream
from lightning_accel.data.reading import Reading
from lightning_accel.data.wire import Delivery, Wire


class Feed(ABC):
    """Where a loader's batches come from.

    Args:
        loader: What is read.
        dealt: What of its samples this rank reads: its batch sampler or its dataset; None if that is neither.

    """

    def __init__(self, loader: DataLoader[Any], dealt: ShardedBatches | ShardedStream | None) -> None:
        self.loader, self.dealt = loader, dealt
        self.per_round = 1
        """What the position in an epoch grows by with each round: see ``ShardedBatches.per_round``."""

    @property
    def is_indexed(self) -> bool:
        """Whether it can begin at a later position without loading what comes before."""
        return isinstance(self.dealt, ShardedBatches)

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers and the dataset which epoch comes."""
        for told in (self.dealt, self.loader.dataset):
            if told is not None and hasattr(told, "set_epoch"):
                told.set_epoch(epoch)

    def generators(self) -> list[Any]:
        """The states of the generators that samplers and the dataset have of their own."""
        return [rng.generator_state(source) for source in generators_of(self.loader)]

    def set_generators(self, states: list[Any]) -> None:
        """Put back what ``generators`` has said."""
        set_generators(self.loader, states)

    def start_at(self, position: int) -> None:
        """Have the next pass begin at a position of the epoch, if it is indexed."""
        if isinstance(self.dealt, ShardedBatches):
            self.dealt.start = position

    @property
    @abstractmethod
    def even_batches(self) -> bool:
        """Whether the last round is completed with samples from the start of the epoch."""

    @even_batches.setter
    @abstractmethod
    def even_batches(self, even: bool) -> None: ...

    @abstractmethod
    def rounds(self, passing: Pass, mark: Mapping[str, Any] | None, skip: int) -> Iterator[Delivery]:
        """This rank's part of each round.

        Args:
            passing: Told of marks.
            mark: From which to go on.
            skip: Rounds to load and drop first.

        """

    @abstractmethod
    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""


class Pass:
    """One pass over a feed.

    Args:
        feed: The feed.
        epoch: Which epoch it is.
        began: The position in it at which the feed began.
        position: Where the first round is.
        mark: From which to go on.
        skip: Rounds to load and drop first.

    """

    def __init__(
        self, feed: Feed, epoch: int, *, began: int, position: int, mark: Mapping[str, Any] | None = None, skip: int = 0
    ) -> None:
        self._feed = feed
        self._from, self._skip = mark, skip
        self.epoch, self.began, self.position = epoch, began, position
        self.mark: Callable[[], Mapping[str, Any]] | None = None if mark is None else lambda: mark
        """What returns where the feed was after the batches that were handed out."""

    def __iter__(self) -> Iterator[Delivery]:
        for delivery in self._feed.rounds(self, self._from, self._skip):
            self.position += self._feed.per_round
            yield delivery


def _rounds(reading: Reading, passing: Pass, most: int, *, drop_last: bool) -> Iterator[tuple[list[Any], list[Any]]]:
    """Batches in rounds, and those of the round that follows; of the last, none."""

    def take() -> list[Any]:
        found = list(islice(reading, most))
        return [] if drop_last and len(found) < most else found

    if passing.mark is None:
        passing.mark = reading.mark()
    current = take()
    while current:
        mark = reading.mark()
        following = take()
        passing.mark = mark
        yield current, following
        current = following


class OwnFeed(Feed):
    """Every rank reads what is its own."""

    def __init__(self, loader: DataLoader[Any], dealt: ShardedBatches | ShardedStream | None) -> None:
        super().__init__(loader, dealt)
        self.per_round = 1 if dealt is None else dealt.per_round

    @property
    @override
    def even_batches(self) -> bool:
        return self.dealt is not None and self.dealt.even_batches

    @even_batches.setter
    def even_batches(self, even: bool) -> None:
        if self.dealt is not None:
            self.dealt.even_batches = even and self.dealt.ranks > 1

    @override
    def rounds(self, passing: Pass, mark: Mapping[str, Any] | None, skip: int) -> Iterator[Delivery]:
        reading = Reading(self.loader, mark)
        deque(islice(reading, skip), maxlen=0)
        for (batch,), following in _rounds(reading, passing, 1, drop_last=False):
            yield Delivery(batch, True, not following, -1 if following else self._remainder())

    def _remainder(self) -> int:
        dealt = self.dealt
        if dealt is None or not dealt.even_batches or dealt.drop_last:
            return -1  # nothing was done twice
        if isinstance(dealt, ShardedStream) and self.loader.num_workers > 1:
            warnings.warn(
                f"Nobody knows how many of the last samples are duplicates, as each of {self.loader.num_workers}"
                " workers completes rounds of its own: gather_for_metrics leaves none out. Use dispatch_batches=True,"
                " one worker, or even_batches=False.",
                stacklevel=2,
            )
            return -1
        if isinstance(dealt, ShardedStream) and self.loader.num_workers:
            try:
                return (len(dealt.dataset) % dealt.per_round) or -1
            except TypeError:  # it has no length, and workers do not tell
                return -1
        return dealt.remainder

    @override
    def __len__(self) -> int:
        return len(self.loader)


class SentFeed(Feed):
    """Rank 0 reads everything and sends each rank its part.

    Args:
        loader: The loader of global batches.
        dealt: Rank 0's batches of indices, which are all.
        wire: Between the ranks.
        split_batches: Split each batch instead of dealing whole ones in turns.
        even_batches: Complete the last round with samples from the start.
        batch_size: Samples of a global batch; None if it is not known.

    """

    def __init__(
        self,
        loader: DataLoader[Any],
        dealt: ShardedBatches | None,
        wire: Wire,
        *,
        split_batches: bool,
        even_batches: bool,
        batch_size: int | None,
    ) -> None:
        super().__init__(loader, dealt)
        self._wire = wire
        self._split = split_batches
        self._even = even_batches
        self._batch_size = batch_size
        self._most = 1 if split_batches else wire.ranks
        self._drop_last = bool(getattr(loader, "drop_last", False))
        self.per_round = self._most * (1 if dealt is None else dealt.per_round)

    @property
    @override
    def even_batches(self) -> bool:
        return self._even

    @even_batches.setter
    def even_batches(self, even: bool) -> None:
        self._even = even

    @override
    def rounds(self, passing: Pass, mark: Mapping[str, Any] | None, skip: int) -> Iterator[Delivery]:
        return self._lead(passing, mark, skip) if self._wire.rank == 0 else self._follow()

    def _follow(self) -> Iterator[Delivery]:
        is_end = False
        while not is_end:
            delivery = self._wire.receive()
            is_end = delivery.is_end
            if delivery.has_batch:
                yield delivery

    def _lead(self, passing: Pass, mark: Mapping[str, Any] | None, skip: int) -> Iterator[Delivery]:
        rounds = self._shares(passing, mark, skip)
        while True:
            try:
                found = next(rounds, None)
            except Exception as error:
                self._wire.send_failure(error)
                raise
            if found is None:
                self._wire.send_end()
                return
            delivery = self._wire.send(*found)
            yield delivery
            if delivery.is_end:
                return

    def _shares(
        self, passing: Pass, mark: Mapping[str, Any] | None, skip: int
    ) -> Iterator[tuple[list[Any], list[bool], int]]:
        """Each rank's part of each round (None: nothing), whose last it is, samples that are no duplicates."""
        ranks, most = self._wire.ranks, self._most
        reading = Reading(self.loader, mark, ahead=most, keeps_head=passing.began == 0)
        deque(islice(reading, skip * most), maxlen=0)
        for batches, following in _rounds(reading, passing, most, drop_last=self._drop_last):
            shares, real = self._dealt(batches, reading, is_last=not following)
            last = [not following] * ranks
            if following and not self._even:
                last = [rank >= self._served(following) for rank in range(ranks)]
            yield shares, last, real if self._even else -1

    def _served(self, batches: list[Any]) -> int:
        """How many ranks get something of a round that is not completed."""
        if not self._split:
            return len(batches)
        own = self._own
        return -(-samples_of(batches[0]) // own)

    @property
    def _own(self) -> int:
        """Samples of one rank in a complete round."""
        assert self._batch_size is not None
        return self._batch_size * self._most // self._wire.ranks

    def _first(self, reading: Reading) -> list[Any]:
        """The first batches of the epoch. They are loaded again if it was not begun with them."""
        if reading.head is not None:
            return reading.head
        self.start_at(0)
        with rng.Stream().drawn_from():
            return list(islice(self.loader, self._most))

    def _dealt(self, batches: list[Any], reading: Reading, *, is_last: bool) -> tuple[list[Any], int]:
        """Each rank's part of a round, and how many of its samples are no duplicates; -1 if all are."""
        ranks, most, size = self._wire.ranks, self._most, self._batch_size
        if not self._split and (not is_last or (size is None and len(batches) == most)):
            return batches, -1
        if not self._split and (self._drop_last or not self._even):  # nothing to fill up: samples need not be counted
            return [*batches, *[None] * (most - len(batches))], -1
        real = sum(map(samples_of, batches))
        if size is None:  # whole batches, whatever their size
            more = cycle(self._first(reading) if self._even else [None])
            return [*batches, *islice(more, most - len(batches))], real
        missing = size * most - real
        if not missing:
            real = -1
        elif not is_last:
            raise ValueError(
                f"Expected batches of {size} samples to split, but one before the last has {real}. Use"
                " split_batches=False."
            )
        if not self._split and not missing:
            return batches, real
        if missing and self._even:
            start = joined_samples(self._first(reading))
            whole, rest = divmod(missing, samples_of(start))
            batches = [*batches, *[start] * whole, *([samples(start, 0, rest)] if rest else [])]
        everything = joined_samples(batches)
        there, own = samples_of(everything), self._own
        cuts = [(min(there, rank * own), min(there, (rank + 1) * own)) for rank in range(ranks)]
        return [samples(everything, *cut) if cut[0] < cut[1] else None for cut in cuts], real

    @override
    def __len__(self) -> int:
        """As many as rank 0 has, which has as many as any."""
        total = len(self.loader)
        if self._split:
            return total
        whole, rest = divmod(total, self._most)
        return whole + (rest > 0 and not self._drop_last)


def is_iterable(loader: DataLoader[Any]) -> bool:
    """Whether a loader's dataset has no indices."""
    return isinstance(loader.dataset, IterableDataset)
