"""Where the training loaders of a fit are: now, and some batches ago.

Lightning's loops fetch a batch before they count it, and where they do not know the length of an epoch one more. A
checkpoint is about the batches that were trained with, so the places before the last few fetches are kept.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.types import _Stateful

from lightning_accel.core import replay

_KEPT = 4
"""Loops are ahead of what was trained with by two batches at most."""


@dataclass(frozen=True)
class Place:
    """Where the training loaders were when so many batches had been fetched from them together."""

    loop: weakref.ref[Any]
    """What fetches from them."""
    fetched: int
    marks: list[replay.Mark | None]
    states: list[Any]
    """What loaders with a state_dict say."""
    wrapped: list[bool]
    """Of ``CombinedLoader(mode="max_size_cycle")``, which have begun anew within the epoch."""

    def positions(self) -> list[dict[str, Any]]:
        """What a checkpoint says of each loader: its ``state``, whether it ``wrapped``, and as ``Mark.position``."""
        found = []
        for mark, state, wrapped in zip(self.marks, self.states, self.wrapped, strict=True):
            found.append({**({} if mark is None else mark.position()), "state": state, "wrapped": wrapped})
        return found


class Places:
    """The places of one fit.

    Args:
        trainer: Whose fit it is.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._kept: deque[Place] = deque(maxlen=_KEPT)
        self.ahead = 0
        """Batches that Lightning has yet to count as fetched: it does so late when it resumes."""

    def index_of(self, loader: Any) -> int | None:
        """Which of the training loaders it is."""
        return _index_of(loader, self._trainer.fit_loop._combined_loader)

    def index_in_validation(self, loader: Any) -> int | None:
        """Which of the loaders for validation within the fit it is."""
        return _index_of(loader, self._trainer.fit_loop.epoch_loop.val_loop._combined_loader)

    def have_workers(self) -> list[bool]:
        """Which of the loaders for validation have made their persistent workers by now."""
        combined = self._trainer.fit_loop.epoch_loop.val_loop._combined_loader
        return [replay.has_workers(loader) for loader in ([] if combined is None else combined.flattened)]

    def keep(self, drawing: replay.Drawing) -> bool:
        """Call before an iterator is asked for a batch. Returns whether all training loaders are asked for one now."""
        iterator = self._iterator
        if iterator is None or not iterator.iterators or iterator.iterators[0] is not drawing:
            return False  # one that a callback has made, or the loops go through all loaders and this is not the first
        last = self._kept[-1] if self._kept else None
        if last is not None and last.loop() is not iterator:
            self._kept.clear()
        elif last is not None and last.fetched == self._fetched:
            return False  # the first one has begun anew: Lightning asks twice for this batch
        self._kept.append(self._look())
        return True

    def now(self) -> Place | None:
        """Where they are; None if there are none."""
        return None if self._iterator is None else self._look()

    def find(self, fetched: int) -> Place | None:
        """Where they were when so many batches of the epoch had been fetched, if that is not long ago."""
        found = next((place for place in reversed(self._kept) if place.fetched == fetched), None)
        if found is None and (now := self.now()) is not None and now.fetched == fetched:
            return now
        return found

    def left(self, known: dict[int, int], drawn: list[int], wrapped: list[bool]) -> int | None:
        """How many batches of the epoch are left.

        Args:
            known: Of some loaders, by index, how many each has left.
            drawn: How many were taken from each.
            wrapped: Which have begun anew.

        Returns:
            None if the length of the epoch is not known.

        """
        combined = self._trainer.fit_loop._combined_loader
        assert combined is not None
        lengths = [math.inf if (n := sized_len(loader)) is None else n for loader in combined.flattened]
        limits = [math.inf] * len(lengths) if combined.limits is None else combined.limits
        left = [known.get(i, min(lengths[i], limits[i]) - drawn[i]) for i in range(len(lengths)) if not wrapped[i]]
        rest = (min if combined._mode == "min_size" else max)(left, default=0)
        return None if rest == math.inf else max(0, int(rest))

    @property
    def _iterator(self) -> Any:
        """What fetches from all training loaders, once it has an iterator of each."""
        fit = self._trainer.fit_loop
        iterator = None if fit._combined_loader is None else fit._combined_loader._iterator
        if iterator is None or fit._data_fetcher is None or len(iterator.iterators) != len(iterator.iterables):
            return None
        return iterator

    @property
    def _fetched(self) -> int:
        fetcher = self._trainer.fit_loop._data_fetcher
        assert fetcher is not None
        return fetcher.fetched + self.ahead

    def _look(self) -> Place:
        iterator = self._iterator
        stateful = [isinstance(loader, _Stateful) for loader in iterator.iterables]
        return Place(
            loop=weakref.ref(iterator),
            fetched=self._fetched,
            marks=[drawing.mark() if isinstance(drawing, replay.Drawing) else None for drawing in iterator.iterators],
            states=[
                loader.state_dict() if has_state else None
                for loader, has_state in zip(iterator.iterables, stateful, strict=True)
            ],
            wrapped=list(getattr(iterator, "_consumed", [False] * len(stateful))),
        )


def _index_of(loader: Any, combined: Any) -> int | None:
    loaders = [] if combined is None else combined.flattened
    return next((index for index, other in enumerate(loaders) if other is loader), None)
