"""Loops in which ranks have different numbers of batches, and none waits for ever.

[Note: standing in]
Every backward, clipping and step of the engine is something all ranks do together, and so is much of what users do in
their loops. So a rank that has run out goes on with the loop: it gets its last batch again, and what its backward
computes counts as zeros. The others' losses are multiplied by (ranks) / (ranks that still have batches), so that the
mean over all ranks is the mean over those. The loop ends on all ranks when nobody has a batch left. Before each batch
the ranks tell each other whether they have one; a rank that had none from the start is lent one.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_accel.core.engine import Engine
from lightning_accel.core.registry import engines_of
from lightning_accel.data.loader import ShardedLoader
from lightning_accel.data.wire import Delivery, host_group, lend

_NOTHING, _MORE, _LAST, _FAILED = range(4)
"""What a rank tells before each round: it has no batch; it has one, and more; it has its last; it cannot go on."""


_LOOPS: weakref.WeakKeyDictionary[Engine, list[object]] = weakref.WeakKeyDictionary()
"""The joined loops that each engine is in the middle of, the innermost last."""


class Joining:
    """Has all ranks come to the end of their batches together. See [Note: standing in].

    Args:
        models: What is trained with these batches: engines, or modules that have some.
        group: The ranks. A process group need not be there before the first batch; without one this process is alone.

    """

    def __init__(self, models: Sequence[nn.Module | Engine] = (), group: dist.ProcessGroup | None = None) -> None:
        self.models = list(models)
        """What is trained; looked at when a loop begins."""
        self._whole = group
        self._group: dist.ProcessGroup | None = None
        self.is_shadow = False
        """Whether the batch that was handed out stands in for one that is not there, and counts nothing."""

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size(self._whole) if dist.is_available() and dist.is_initialized() else 1

    def gather(self, value: Any) -> list[Any]:
        """A small object of every rank, by rank."""
        if self.ranks == 1:
            return [value]
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, value, group=self._connected())
        return everyone

    def _connected(self) -> dist.ProcessGroup:
        if self._group is None:
            self._group = host_group(self._whole)
        return self._group

    def run(self, deliveries: Iterator[Delivery]) -> Generator[Delivery, None, None]:
        """This rank's batches, and others in their place until all ranks have come to their last.

        Raises:
            RuntimeError: If another rank has failed, or does not come.
            ValueError: If another joined loop of the same models takes turns with this one.

        """
        engines = [engine for model in self.models for engine in _engines(model)]
        kept: Any = None
        is_first = True
        loop = object()
        before = [engine.share for engine in engines]
        for engine in engines:
            _LOOPS.setdefault(engine, []).append(loop)
        try:
            while True:
                if any(_LOOPS[engine][-1] is not loop for engine in engines):
                    raise ValueError(
                        "Expected one joined loop at a time for a model, or one within another, got two in turns:"
                        " a backward would count by the batches of the last alone. Join one loader of both batches"
                        " instead, such as joined(zip(first, second), model)."
                    )
                delivery = self._next(deliveries)
                told = _NOTHING if delivery is None else _LAST if delivery.is_last else _MORE
                codes = self._tell(told)
                if _FAILED in codes:
                    raise RuntimeError(
                        f"rank {codes.index(_FAILED)} has failed to load a batch of a joined loop; its own error says"
                        " why."
                    )
                active = [rank for rank, code in enumerate(codes) if code != _NOTHING]
                if not active:
                    return
                if delivery is not None:
                    kept = delivery.batch
                if is_first and len(active) < self.ranks:
                    takers = [rank for rank in range(self.ranks) if rank not in active]
                    lent = lend(kept, active[0], takers, self._connected())
                    kept = kept if delivery is not None else lent
                is_first = False
                self.is_shadow = delivery is None
                for engine in engines:
                    engine.share = 0.0 if self.is_shadow else self.ranks / len(active)
                is_last = _MORE not in codes
                yield Delivery(kept, True, is_last, -1)
                if is_last:
                    return
        finally:
            self.is_shadow = False
            for engine, share in zip(engines, before, strict=True):
                _LOOPS[engine].remove(loop)
                engine.share = share if _LOOPS[engine] else None

    def _next(self, deliveries: Iterator[Delivery]) -> Delivery | None:
        try:
            return next(deliveries, None)
        except Exception:
            with contextlib.suppress(RuntimeError):
                self._tell(_FAILED)
            raise

    def _tell(self, code: int) -> list[int]:
        if self.ranks == 1:
            return [code]
        mine = torch.tensor([code])
        everyone = [torch.zeros_like(mine) for _ in range(self.ranks)]
        try:
            dist.all_gather(everyone, mine, group=self._connected())
        except RuntimeError as error:
            raise RuntimeError(
                "Expected all ranks to go through a joined loop to its end, but some did not come for their next batch,"
                " or have ended. Leave such a loop on all ranks after the same batch, or on none."
            ) from error
        return [int(one.item()) for one in everyone]


class JoinedLoader:
    """What a loop goes through whose ranks have different numbers of batches; ``joined`` makes it.

    Args:
        loader: This rank's batches: a loader, or anything that can be iterated over.
        joining: The ranks.

    """

    def __init__(self, loader: Iterable[Any], joining: Joining) -> None:
        self.loader = loader
        """This rank's own."""
        self.joining = joining
        self._length: int | None = None
        self._is_measured = False
        if joining.ranks > 1:
            self.measure()

    @property
    def is_shadow(self) -> bool:
        """Whether the batch that was handed out stands in for one that is not there, and counts nothing."""
        return self.joining.is_shadow

    def measure(self) -> None:
        """Find out how long it is. All ranks call this together; it is done at once if there is a process group."""
        try:
            own = len(self.loader)  # type: ignore[arg-type]
        except TypeError:
            own = None
        everyone = self.joining.gather(own)
        self._length = None if None in everyone else max(everyone)
        self._is_measured = True

    def __len__(self) -> int:
        """Batches of the rank that has most.

        Raises:
            TypeError: If any rank does not know.

        """
        if not self._is_measured:
            self.measure()
        if self._length is None:
            raise TypeError("Expected a joined loader's length to be known on all ranks, but some rank's has none.")
        return self._length

    def __iter__(self) -> Iterator[Any]:
        loader = self.loader
        if isinstance(loader, ShardedLoader):
            with _set(loader, "joining", self.joining):
                yield from loader
            return
        for delivery in self.joining.run(_deliveries(loader)):
            yield delivery.batch

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # within pickle and copy
            raise AttributeError(name)
        return getattr(self.loader, name)


def joined(loader: Iterable[Any], *models: nn.Module | Engine, group: dist.ProcessGroup | None = None) -> JoinedLoader:
    """Let ranks have different numbers of batches in a loop. All of them call this, and go through it to its end.

    Ranks that run out go on with the loop: they get their last batch again, on which gradients count as zeros.
    Gradients are the mean over the ranks that still have batches. ``is_shadow`` of what is returned tells the loop that
    a batch counts nothing, as when it adds up losses.

    Args:
        loader: This rank's batches, any that can be iterated over; or a prepared loader.
        models: What is trained in the loop: what Fabric's ``setup`` or ``Accelerator.prepare`` returned, or engines.
            For a Trainer none: its strategy knows.
        group: The ranks; the default group if not given.

    Returns:
        What to iterate over. Its length is that of the rank that has most.

    Raises:
        ValueError: If a model has no engine.

    """
    _require_engines(models)
    return JoinedLoader(loader, Joining(models, group))


@contextlib.contextmanager
def join_uneven_inputs(
    models: Sequence[nn.Module | Engine],
    loaders: Iterable[ShardedLoader],
    *,
    even_batches: bool | None = None,
    group: dist.ProcessGroup | None = None,
) -> Iterator[None]:
    """Within it, prepared loaders may have different numbers of batches on different ranks; see ``joined``.

    All ranks enter it together.

    Args:
        models: What is trained within it.
        loaders: Those that may be iterated over within it.
        even_batches: For the loaders, within it, instead of what they were prepared with.
        group: The ranks; the default group if not given.

    Raises:
        ValueError: If a model has no engine.

    """
    _require_engines(models)
    with contextlib.ExitStack() as stack:
        joining = Joining(models, group)
        for loader in loaders:
            stack.enter_context(_set(loader, "joining", joining))
            if even_batches is not None:
                stack.enter_context(_set(loader, "even_batches", even_batches))
        yield


@contextlib.contextmanager
def _set(loader: ShardedLoader, name: str, value: Any) -> Iterator[None]:
    before = getattr(loader, name)
    setattr(loader, name, value)
    try:
        yield
    finally:
        setattr(loader, name, before)


def _deliveries(loader: Iterable[Any]) -> Iterator[Delivery]:
    """The batches of a loader, and whether each is the last."""
    end = object()
    iterator = iter(loader)
    batch = next(iterator, end)
    while batch is not end:
        following = next(iterator, end)
        yield Delivery(batch, True, following is end, -1)
        batch = following


def _engines(model: nn.Module | Engine) -> list[Engine]:
    return [model] if isinstance(model, Engine) else engines_of(model)


def _require_engines(models: Sequence[nn.Module | Engine]) -> None:
    for model in models:
        if not _engines(model):
            raise ValueError(
                f"Expected models that an engine trains, got a {type(model).__name__} that none does: nobody could have"
                " its gradients count as zeros. Set it up first, with fabric.setup(...) or accelerator.prepare(...)."
            )
