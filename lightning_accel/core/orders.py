"""The orders of samples in which iterators are made: drawn once more, and gone on from within.

[Note: orders that are opened again]
A sampler may draw its order whenever it is opened. Iterators with workers open it twice (those with persistent workers
once, but for the first), others once, and the last order counts. One of torchdata's that goes on opens it some more
times, and at the end of an epoch makes a second iterator. So the order that counted in the interrupted run is given
again each time, and afterwards random numbers are as if the others had never been.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from typing_extensions import override

from lightning_accel.core import rng
from lightning_accel.core.data_position import set_generators


class Orders:
    """The orders that a loader's sampler gives while an iterator is made that goes on by itself.

    See [Note: orders that are opened again].

    Args:
        loader: Whose sampler it is.
        sources: The loader's own generators.
        counts: Which order, from 1 on, is the one that counts.

    """

    def __init__(self, loader: Any, sources: list[Any], counts: int) -> None:
        self._loader, self._sources, self._counts = loader, sources, counts
        self._before: list[tuple[rng.State, list[Any]]] = []
        self._after: tuple[rng.State, list[Any]] | None = None

    def open(self, sampler: Any) -> Iterator[Any]:
        """Open a sampler."""
        if sampler is getattr(self._loader, "batch_sampler", None):
            return _iterate(sampler)  # which opens what it takes its samples from
        if len(self._before) < self._counts:
            self._before.append(self._state())
        else:
            self._after = self._after or self._state()
            self._set(self._before[-1])
        return _iterate(sampler)

    def end(self) -> None:
        """Call when the iterator is made."""
        if self._after is not None:
            self._set(self._after)

    def _state(self) -> tuple[rng.State, list[Any]]:
        return rng.collect(), [rng.generator_state(source) for source in self._sources]

    def _set(self, state: tuple[rng.State, list[Any]]) -> None:
        rng.restore(state[0])
        set_generators(self._loader, state[1])


class Indices:
    """A sampler, as the iterators of a watched loader see it that are not to begin at its beginning.

    Args:
        sampler: The loader's own.
        way: What opens it.

    """

    def __init__(self, sampler: Any, way: Callable[[Any], Iterator[Any]]) -> None:
        self._sampler = sampler
        self._way = way

    def __iter__(self) -> Iterator[Any]:
        return self._way(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)


class Opened(Iterator[Any]):
    """Indices that are opened when the first is asked for, or before, but not when ``iter`` is called.

    So do samplers that are generators, and torch calls ``iter`` twice where there are workers.
    """

    def __init__(self, way: Callable[[], Iterator[Any]]) -> None:
        self._way = way
        self._indices: Iterator[Any] | None = None

    def open(self) -> Iterator[Any]:
        """Open them, if that has not been done."""
        if self._indices is None:
            self._indices = self._way()
        return self._indices

    @override
    def __next__(self) -> Any:
        return next(self.open())


def opens_at_once(loader: Any) -> bool:
    """Whether an iterator draws its order as it is made.

    Torch's batch samplers are generators, which do nothing until a batch is asked for.
    """
    batches = loader.batch_sampler
    parts = [loader.sampler if batches is None else batches, getattr(batches, "sampler", None)]
    return not any(inspect.isgeneratorfunction(getattr(type(part), "__iter__", None)) for part in parts)


def after_orders(
    loader: Any, position: Mapping[str, Any], way: Callable[[Any], Iterator[Any]], sampler: Any
) -> Iterator[Any]:
    """The order that counts, where iterators draw orders as they are made. See [Note: orders that are opened again]."""
    rng.restore(position["made"])
    set_generators(loader, position["generators"])
    for _ in range(order_that_counts(loader, position) - 1):
        iter(sampler)
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # the workers' seed
    return way(sampler)


def order_that_counts(loader: Any, position: Mapping[str, Any]) -> int:
    """Which of the orders that are opened as an iterator is made, from 1 on."""
    return 2 if getattr(loader, "num_workers", 0) and not position["is_reset"] else 1


def after_batches(batches: int, sampler: Any) -> Iterator[Any]:
    """A sampler's indices after the first batches."""
    indices = _iterate(sampler)
    deque(islice(indices, batches), maxlen=0)
    return indices


def from_place(rest: Callable[[int], Iterable[Any]], start: int, sampler: Any) -> Iterator[Any]:
    """A rank's share of an order from one place on; the sampler itself is not asked."""
    return iter(rest(start))


def _iterate(sampler: Any) -> Iterator[Any]:
    indices: Iterator[Any] = iter(sampler)
    return indices
