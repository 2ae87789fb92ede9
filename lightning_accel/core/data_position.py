"""Which samples of an epoch are done, and how any number of ranks share the rest: arithmetic, nothing is loaded.

[Note: the global order]
A distributed sampler has one order of all samples, which its seed and the epoch fix, and gives rank r of N the places
r, r + N, r + 2N, … of it. So N ranks that have taken k batches of b samples each have used up the first k·b·N places,
and M ranks go on from there by sharing the rest in the same way::

    place           0  1  2  3  4  5  6  7  8  9 10 11 12
    rank of N = 2   0  1  0  1  0  1  0  1                   after k = 1 batch of b = 4 samples
    rank of M = 3                           0  1  2  0  1    and rank 2 gets place 0 again, as it has one too few

Where the rest does not divide evenly it is padded with the first samples of the epoch, or cut, as the sampler does at
the end of every epoch. No other sample is seen twice, and none is left out.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_accel.core import rng

T = TypeVar("T")

_DEPTH = 6
"""From a loader by its dataset, its datasets, one of them and its transform to a generator."""
_MANY = 100
"""Longer collections are data."""
_NO_PARTS = ("_iterator", "_accel_watch")
"""What a loader has that is none of its own: workers, and who watches it."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How ranks share the order of an epoch."""

    size: int
    """Samples of the epoch."""
    ranks: int
    batch_size: int
    """Samples that a rank takes at a time."""
    drop_last: bool = False
    """Whether the ranks leave out what does not divide evenly by their number, instead of padding it."""
    drop_last_batch: bool = False
    """Whether each rank leaves out its last batch if that is short."""

    def samples_of_rank(self, start: int = 0) -> int:
        """How many samples each rank gets of those from place ``start`` on."""
        rest = max(0, self.size - start)
        return rest // self.ranks if self.drop_last else -(-rest // self.ranks)

    def batches(self, start: int = 0) -> int:
        """How many batches each rank gets of the samples from place ``start`` on."""
        samples = self.samples_of_rank(start)
        return samples // self.batch_size if self.drop_last_batch else -(-samples // self.batch_size)

    def end(self, batches: int, start: int = 0) -> int:
        """The place up to which all samples are used when each rank has taken so many batches from ``start`` on."""
        samples = min(batches * self.batch_size, self.samples_of_rank(start))
        return min(self.size, start + samples * self.ranks)

    def batches_within(self, limit: float, start: int) -> int:
        """How many batches each rank takes from ``start`` on, of an epoch that ends after ``limit`` whole batches."""
        batches = self.batches(start)
        if limit == float("inf"):
            return batches
        samples = max(0, int(limit) * self.batch_size * self.ranks - start)
        return min(batches, -(-samples // (self.batch_size * self.ranks)))

    def rest(self, order: Sequence[T], start: int, rank: int) -> list[T]:
        """This rank's samples from place ``start`` on. See [Note: the global order].

        Args:
            order: The whole order, ``size`` samples.
            start: How many of them are done.
            rank: Which of the ranks.

        """
        assert len(order) == self.size
        tail = list(order[start:])
        total = self.samples_of_rank(start) * self.ranks
        while len(tail) < total:
            tail += order[: total - len(tail)]
        return tail[rank : total : self.ranks]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A loader's samples, of which this rank gets a share."""

    sampler: Any
    rank: int
    shares: Shares
    automatic: bool
    """Whether there are batches, or single samples (``batch_size=None``)."""

    def described(self) -> dict[str, Any]:
        """All that the order and its division depend on: ``seed``, ``epoch``, ``shuffle``, and the fields of shares."""
        names = ("seed", "epoch", "shuffle")
        return {**{name: getattr(self.sampler, name, None) for name in names}, **asdict(self.shares)}

    def rest(self, start: int) -> Iterable[Any]:
        """This rank's batches of indices from place ``start`` on.

        Raises:
            ValueError: If the sampler's order cannot be told from outside.

        """
        indices = self.shares.rest(order_of(self.sampler), start, self.rank)
        if not self.automatic:
            return indices
        return BatchSampler(indices, self.shares.batch_size, self.shares.drop_last_batch)


def shared(loader: Any) -> Shared | None:
    """What is known of a loader whose order of samples is divided over ranks; None of others.

    That is a ``DataLoader`` with a ``DistributedSampler``, or one like it, and torch's own ``BatchSampler``, or none.
    """
    if not isinstance(loader, DataLoader):
        return None
    batches: Any = loader.batch_sampler
    sampler: Any = loader.sampler if batches is None else getattr(batches, "sampler", None)
    if batches is not None and not takes_in_order(batches):
        return None
    if not all(hasattr(sampler, name) for name in ("num_replicas", "rank", "dataset")):
        return None
    shares = Shares(
        size=len(sampler.dataset),
        ranks=sampler.num_replicas,
        batch_size=1 if batches is None else batches.batch_size,
        drop_last=bool(getattr(sampler, "drop_last", False)),
        drop_last_batch=batches is not None and batches.drop_last,
    )
    return Shared(sampler=sampler, rank=sampler.rank, shares=shares, automatic=batches is not None)


def takes_in_order(batches: Any) -> bool:
    """Whether a batch sampler is torch's own, or torchdata's, which does the same; others may do anything."""
    kind = type(batches)
    return kind is BatchSampler or (isinstance(batches, BatchSampler) and kind.__module__.startswith("torchdata."))


def order_of(sampler: Any) -> list[Any]:
    """The order of all samples that a distributed sampler divides over the ranks, without padding.

    What the sampler draws for it is drawn once.

    Raises:
        ValueError: If the sampler does not divide it as ``torch.utils.data.DistributedSampler`` does.

    """
    size = len(sampler.dataset)
    alone = copy.copy(sampler)
    alone.num_replicas, alone.rank, alone.num_samples, alone.total_size = 1, 0, size, size
    before = rng.collect(), [rng.generator_state(generator) for generator in generators_of(sampler)]
    order = list(alone)
    if type(sampler) is DistributedSampler:
        return order
    rng.restore(before[0])  # a sampler that wraps another may have drawn
    set_generators(sampler, before[1])
    drop_last = bool(getattr(sampler, "drop_last", False))
    shares = Shares(size=size, ranks=sampler.num_replicas, batch_size=1, drop_last=drop_last)
    if len(order) != size or list(sampler) != shares.rest(order, 0, sampler.rank):
        raise ValueError(
            f"Expected a sampler that gives rank r of N the places r, r + N, … of one order, as torch's"
            f" DistributedSampler does: {type(sampler).__name__} does something else, so that nobody can tell how other"
            " ranks should share the rest of an epoch. Resume on as many ranks and with the same batch size as when the"
            " checkpoint was made, or from a checkpoint of the end of an epoch."
        )
    return order


def batch_size_of(loader: Any) -> int | None:
    """How many samples a loader takes at a time; None if that is not known, or single samples."""
    batch_size = getattr(loader, "batch_size", None)
    return getattr(getattr(loader, "batch_sampler", None), "batch_size", None) if batch_size is None else batch_size


def generators_of(loader: Any) -> list[Any]:
    """The generators of a loader, its samplers, its dataset and what these keep, always in the same order.

    What they keep is looked through to a depth of some objects and collections, but for modules and arrays.
    """
    found: dict[int, Any] = {}
    seen: set[int] = set()
    queue: deque[tuple[Any, int]] = deque([(loader, 0)])
    while queue:
        holder, depth = queue.popleft()
        if rng.is_generator(holder):
            found[id(holder)] = holder
        elif id(holder) not in seen and depth < _DEPTH:
            seen.add(id(holder))
            queue.extend((part, depth + 1) for part in _parts(holder))
    return list(found.values())


def _parts(holder: Any) -> list[Any]:
    """What an object or a collection keeps that may have a generator."""
    if isinstance(holder, (nn.Module, Tensor, type, ModuleType)) or callable(getattr(holder, "__array__", None)):
        return []
    kept = [value for name, value in getattr(holder, "__dict__", {}).items() if name not in _NO_PARTS]
    if isinstance(holder, (list, tuple, dict)) and len(holder) <= _MANY:
        kept += holder.values() if isinstance(holder, dict) else holder
    return kept


def set_generators(loader: Any, states: Sequence[Any]) -> None:
    """Set the generators that ``generators_of`` finds, as far as there are states for them."""
    for generator, state in zip(generators_of(loader), states):  # noqa: B905
        rng.set_generator_state(generator, state)
