"""Loaders whose iterators can be made once more, at the place and with the random numbers of an interrupted run.

A watched loader is the object that it was, of a class derived from its own: ``isinstance``, ``len`` and attributes are
the same. Its iterators tell the :class:`Watcher` before each batch, and know what they began with.

[Note: replay]
Which samples come is decided by draws from random numbers, at different times::

    iter(loader)       the seed for workers; with workers also what the sampler draws for its order
    first next()       without workers, what the sampler draws for its order
    each next()        what the dataset draws; of some samplers, the next index

So an iterator's beginning is two states of all generators, before it was made and before its first batch. To go on
after k batches, both are done again from these states and k batches of *indices* are taken: no sample is loaded. All of
that draws from a stream beside the random numbers of the process. An iterable dataset has no indices: k batches are
loaded and dropped.

A loader with persistent workers makes one iterator and resets it for each epoch, without a new seed for its workers. So
one that was a reset iterator is made first, with random numbers that count nowhere, and then reset.

What workers draw for themselves cannot be had again: they begin with their seed and would have to load all that they
have loaded. The samples and their order are exact, random augmentation in workers is not.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_accel.core import rng
from lightning_accel.core.data_position import batch_size_of, generators_of, set_generators, shared
from lightning_accel.core.orders import (
    Indices,
    Opened,
    Orders,
    after_batches,
    after_orders,
    from_place,
    opens_at_once,
    order_that_counts,
)

_KEY = "_accel_watch"
"""Where a watched loader keeps its :class:`_Watch`."""
_ORIGINAL = "_accel_original"
"""Where the class of a watched loader has the one that it was."""


@dataclass(frozen=True)
class Beginning:
    """How an iterator is to be made: as one that was interrupted.

    Args:
        stream: The random numbers that it is made with. None: those of the process.
        position: Of the interrupted one, from ``Mark.position``. None: at the beginning, with ``stream`` alone.
        start: For an order of samples that is shared anew, the place to go on from; see
            ``lightning_accel.core.data_position``. None: after as many batches as ``position`` says.
        state: Of a loader that keeps its own place, what it has said of it: it goes on from there by itself.

    """

    stream: rng.Stream | None
    position: Mapping[str, Any] | None = None
    start: int | None = None
    state: Any = None


class Watcher(Protocol):
    """Who is told of the iterators of watched loaders."""

    def begin(self, loader: Any) -> Beginning | None:
        """How an iterator that is being made shall begin; None: as ever."""

    def draw(self, drawing: Drawing) -> None:
        """An iterator is about to be asked for a batch."""


@dataclass
class Origin:
    """What an iterator began with. See [Note: replay]."""

    loader: Any
    made: rng.State
    """Before it was made."""
    sources: list[Any]
    """The loader's own generators."""
    generators: list[Any]
    """Their states, then."""
    is_reset: bool
    """Whether it was one with persistent workers that had been there before."""
    first: Mapping[str, Any] | None = None
    """Before its first batch."""
    start: int = 0
    """The place in the order that its ranks share from which it began."""


@dataclass(frozen=True)
class Mark:
    """A place in an iterator."""

    origin: Origin
    drawn: int
    generators: list[Any]

    def position(self) -> dict[str, Any]:
        """All that it takes to come here again, as tensors, numbers and texts.

        Returns:
            ``drawn``, the number of batches; ``batch_size``; the beginning (``made``, ``first``, ``generators``,
            ``is_reset``); ``generators_now``; and ``order`` if ranks share one: what ``Shared.described`` says, the
            place from which they have shared it in this way (``start``) and the one up to which it is used (``end``).

        """
        origin = self.origin
        return {
            "drawn": self.drawn,
            "batch_size": batch_size_of(origin.loader),
            "made": origin.made,
            "first": origin.first,
            "generators": origin.generators,
            "generators_now": self.generators,
            "is_reset": origin.is_reset,
            "order": _order(origin, self.drawn),
        }


def after(drawn: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """A position of which nothing is known but the number of batches.

    Args:
        drawn: That number.
        state: Random numbers to begin with.

    """
    return {
        "drawn": drawn,
        "made": state,
        "first": None,
        "generators": [],
        "generators_now": [],
        "is_reset": False,
    }


class Drawing(Iterator[Any]):
    """An iterator of a watched loader.

    Args:
        inner: The loader's own.
        watcher: Who is told.
        origin: What it began with.
        drawn: How many of its batches count as drawn already.
        stream: Random numbers to draw from until ``go_live`` is called, instead of the process's.

    """

    def __init__(
        self,
        inner: Iterator[Any],
        watcher: Watcher,
        origin: Origin,
        drawn: int = 0,
        stream: rng.Stream | None = None,
    ) -> None:
        self._inner = inner
        self._watcher = watcher
        self._stream = stream
        self.origin = origin
        self.drawn = drawn
        """The number of batches that were taken from it."""
        self.is_exhausted = False

    @override
    def __next__(self) -> Any:
        self._watcher.draw(self)
        with _drawing_from(self._stream):
            if self.origin.first is None:
                self.origin.first = rng.collect()
            try:
                batch = next(self._inner)
            except StopIteration:
                self.is_exhausted = True
                raise
        self.drawn += 1
        return batch

    def __len__(self) -> int:
        length: int = len(self._inner)  # type: ignore[arg-type]
        return length

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # within pickle and copy
            raise AttributeError(name)
        return getattr(self._inner, name)

    def go_live(self) -> None:
        """Draw from the process's random numbers from now on."""
        self._stream = None

    def mark(self) -> Mark:
        """Where it is now."""
        return Mark(self.origin, self.drawn, [rng.generator_state(source) for source in self.origin.sources])


def watch(loader: Any, watcher: Watcher) -> Any:
    """Have a loader's iterators be :class:`Drawing`.

    Args:
        loader: Anything that can be iterated over.
        watcher: Who is told; instead of an earlier one, if there is.

    Returns:
        The loader itself. Of what cannot be given another class, such as a list, a stand-in with its attributes.

    """
    if not hasattr(type(loader), _ORIGINAL) and not _give_class(loader):
        loader = _StandIn(loader)
        _give_class(loader)
    loader.__dict__[_KEY] = _Watch(watcher)
    return loader


def has_workers(loader: Any) -> bool:
    """Whether a loader has made persistent workers, so that its next iterator is a reset one."""
    return bool(getattr(loader, "persistent_workers", False)) and loader._iterator is not None


def start_workers(loader: Any) -> None:
    """Make a watched loader's persistent workers, with random numbers that count nowhere, and have them load nothing.

    Its next iterator is then a reset one, as that of a loader which has been iterated over before.
    """
    if getattr(loader, "persistent_workers", False) and not has_workers(loader):
        loader.__dict__[_KEY].start_workers(loader)


def release(loader: Any) -> None:
    """Give a watched loader its class back."""
    if hasattr(type(loader), _ORIGINAL):
        loader.__dict__.pop(_KEY, None)
        loader.__class__ = getattr(type(loader), _ORIGINAL)


class _StandIn:
    """Something to iterate over, in the place of an object whose class cannot be exchanged."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "_iterable":
            raise AttributeError(name)
        return getattr(self._iterable, name)


class _Watch:
    """What a watched loader does when an iterator is made of it."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._open: Callable[[Any], Iterator[Any]] | None = None
        self._opened: Opened | None = None

    def look_at(self, sampler: Any) -> Any:
        """What the iterator that is being made takes its indices from."""
        return sampler if self._open is None else Indices(sampler, self.indices)

    def indices(self, sampler: Any) -> Iterator[Any]:
        """The indices of one pass over a sampler."""
        return iter(sampler) if self._open is None else self._open(sampler)

    def start_workers(self, loader: Any) -> None:
        with rng.Stream().drawn_from(), self._opening(lambda sampler: iter(())):
            _make(loader)

    def begin(self, loader: Any) -> Drawing:
        beginning = self._watcher.begin(loader)
        if beginning is not None and beginning.state is not None:
            return self._go_on_by_itself(loader, beginning)
        if beginning is not None and beginning.position is not None:
            assert beginning.stream is not None
            return self._begin_again(loader, beginning.stream, beginning.position, beginning.start)
        stream = None if beginning is None else beginning.stream
        with _drawing_from(stream):
            origin = _origin(loader)
            return Drawing(_make(loader), self._watcher, origin, stream=stream)

    def _begin_again(self, loader: Any, stream: rng.Stream, position: Mapping[str, Any], start: int | None) -> Drawing:
        if getattr(loader, "persistent_workers", False):
            if position["is_reset"]:
                start_workers(loader)
            else:
                loader._iterator = None
        set_generators(loader, position["generators"])
        drawn = position["drawn"] if start is None else 0
        goes_on = drawn > 0 or start is not None
        by_index = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if start is not None:
            known = shared(loader)
            assert known is not None
            way: Callable[[Any], Iterator[Any]] = functools.partial(from_place, known.rest, start)
        else:
            way = functools.partial(after_batches, drawn)
        if by_index and opens_at_once(loader):
            way = functools.partial(after_orders, loader, position, way)
        with self._opening(functools.partial(self._lazily, way)) if by_index else contextlib.nullcontext():
            with stream.drawn_from():
                inner = _make(loader)
            if goes_on and position["first"] is not None:
                stream.state = position["first"]
            with stream.drawn_from():
                if not by_index:
                    deque(islice(inner, drawn), maxlen=0)
                elif goes_on and self._opened is not None:
                    self._opened.open()
        self._opened = None
        if goes_on:
            set_generators(loader, position["generators_now"])
        origin = Origin(
            loader,
            position["made"],
            generators_of(loader),
            position["generators"],
            position["is_reset"],
            position["first"] if goes_on else None,
            start or 0,
        )
        return Drawing(inner, self._watcher, origin, drawn, stream)

    def _lazily(self, way: Callable[[Any], Iterator[Any]], sampler: Any) -> Iterator[Any]:
        self._opened = Opened(functools.partial(way, sampler))
        return self._opened

    def _go_on_by_itself(self, loader: Any, beginning: Beginning) -> Drawing:
        """See [Note: orders that are opened again]."""
        position = beginning.position
        assert position is not None
        set_generators(loader, position["generators"])
        loader.load_state_dict(beginning.state)  # it may know the states of its generators better
        with _drawing_from(beginning.stream):
            origin = _origin(loader)
            orders = Orders(loader, origin.sources, order_that_counts(loader, position))
            with self._opening(orders.open), self._looking_within(loader):
                inner = _make(loader)
            orders.end()
        return Drawing(inner, self._watcher, origin, position["drawn"], beginning.stream)

    @contextlib.contextmanager
    def _looking_within(self, loader: Any) -> Iterator[None]:
        """Within it, a batch sampler that an iterator is made of looks at what it takes its samples from as we do."""
        batches: Any = getattr(loader, "batch_sampler", None)
        sampler = getattr(batches, "sampler", None)
        if sampler is None:
            yield
            return
        batches.sampler = Indices(sampler, self.indices)
        try:
            yield
        finally:
            batches.sampler = sampler

    @contextlib.contextmanager
    def _opening(self, way: Callable[[Any], Iterator[Any]]) -> Iterator[None]:
        self._open = way
        try:
            yield
        finally:
            self._open = None


def _drawing_from(stream: rng.Stream | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if stream is None else stream.drawn_from()


def _make(loader: Any) -> Iterator[Any]:
    """An iterator as the loader's own class makes it."""
    iterator: Iterator[Any] = getattr(type(loader), _ORIGINAL).__iter__(loader)
    return iterator


def _origin(loader: Any) -> Origin:
    sources = generators_of(loader)
    states = [rng.generator_state(source) for source in sources]
    return Origin(loader, rng.collect(), sources, states, has_workers(loader))


def _order(origin: Origin, drawn: int) -> dict[str, Any] | None:
    known = shared(origin.loader)
    if known is None:
        return None
    return {**known.described(), "start": origin.start, "end": known.shares.end(drawn, origin.start)}


def _give_class(loader: Any) -> bool:
    """Give a loader a class that is watched. Returns whether that can be."""
    original: Any = type(loader)
    try:
        loader.__class__ = _watched_class(original)
    except (TypeError, AttributeError):
        return False
    return True


def _new(cls: Any, *arguments: Any) -> Any:
    """As pickle makes new objects; it refuses to do so for another class than the object's."""
    return cls.__new__(cls, *arguments)


@functools.cache
def _watched_class(original: Any) -> type:
    """A class whose objects are those of another, but for the iterators that they make."""
    make_iterator = original.__iter__

    def __iter__(self: Any) -> Iterator[Any]:
        watching: _Watch | None = self.__dict__.get(_KEY)
        return make_iterator(self) if watching is None else watching.begin(self)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Copies and pickles are of the loader's own class and are not watched.
        reduced = original.__reduce_ex__(self, protocol)
        if isinstance(reduced, str):
            return reduced
        make, arguments, *rest = reduced
        make = _new if make is copyreg.__newobj__ else make  # type: ignore[attr-defined]
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != _KEY}
        return (make, tuple(original if a is type(self) else a for a in arguments), *rest)

    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__iter__": __iter__,
        "__reduce_ex__": __reduce_ex__,
        _ORIGINAL: original,
    }
    if issubclass(original, DataLoader):

        def _index_sampler(self: Any) -> Any:
            sampler = original._index_sampler.fget(self)
            watching: _Watch | None = self.__dict__.get(_KEY)
            return sampler if watching is None else watching.look_at(sampler)

        members["_index_sampler"] = property(_index_sampler)
    # Python gives an object another class only if that has the same single base.
    made: type = type(original)(original.__name__, (original,), members)
    return made
