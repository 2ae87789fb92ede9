"""One pass over a loader, and the places from which another process can go on with it.

[Note: one batch ahead]
A loader must know that a batch is the last one when it hands it out, so the next one is loaded before. What that draws
from the process's random numbers is drawn again by a run that goes on: a mark is made before, and holds their state. So
this batch is made once more with the same numbers, beside those of the process, which are to be those of the
interrupted run when it was saved. Making the iterator draws as well, and is done with the numbers of the first time.
Rank 0, if it loads for all, is ahead by as many batches as there are ranks.

What workers draw for themselves cannot be had again: samples and their order are exact, random augmentation in workers
is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_accel.core import rng
from lightning_accel.core.data_position import generators_of, set_generators


def keeps_place(loader: Any) -> bool:
    """Whether a loader can go on by itself, as torchdata's ``StatefulDataLoader``."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


class Reading(Iterator[Any]):
    """One pass over a loader.

    Args:
        loader: The loader; its batch sampler begins with the batches that are to come.
        mark: Where another pass was, to go on from.
        ahead: How many batches are drawn after a mark before that is looked at.
        keeps_head: Keep as many from the start of the epoch.

    """

    def __init__(
        self,
        loader: DataLoader[Any],
        mark: Mapping[str, Any] | None = None,
        ahead: int = 1,
        *,
        keeps_head: bool = False,
    ) -> None:
        self._loader = loader
        self._ahead = ahead
        self.head: list[Any] | None = [] if keeps_head else None
        """The first batches of the epoch; None if they are not kept, or were not loaded."""
        self._again = 0  # batches that are yet to be drawn with the random numbers of the first time
        self._sources = generators_of(loader)
        self._stream: rng.Stream | None = None
        self._began: dict[str, Any]
        self.drawn = 0
        """How many batches were taken from it, those of an earlier process included."""
        if mark is None:
            self._began = {"made": rng.collect(), "generators": self._states()}
            self._inner = iter(loader)
            return
        self.drawn = mark["drawn"]
        self._began = {name: mark[name] for name in ("made", "generators")}
        set_generators(loader, mark["generators"])
        stream = rng.Stream(mark["made"])
        with stream.drawn_from():
            if keeps_place(loader) and mark["state"] is not None:
                loader.load_state_dict(mark["state"])  # type: ignore[attr-defined]
                self._inner = iter(loader)
                self.head = None
            else:
                self._inner = iter(loader)
                if isinstance(loader.dataset, IterableDataset):
                    for batch in islice(self._inner, self.drawn):
                        self._keep(batch)
                else:
                    self.head = None
        # Those of samplers are not set: they draw the order again, at the latest when the first batch is asked for.
        of_dataset = {id(source) for source in generators_of(loader.dataset)}
        for source, state in zip(self._sources, mark["generators_now"], strict=False):
            if id(source) in of_dataset:
                rng.set_generator_state(source, state)
        if mark["now"] is not None:
            self._stream = rng.Stream(mark["now"])
            self._again = mark["ahead"]

    def mark(self) -> Callable[[], dict[str, Any]]:
        """What returns where it is now: tensors, numbers and texts, and what a loader says that keeps its own place."""
        loader: Any = self._loader
        now = rng.collect_later() if loader.num_workers == 0 else None  # else only workers draw
        noted = {
            **self._began,
            "drawn": self.drawn,
            "ahead": self._ahead,
            "generators_now": self._states(),
            "state": loader.state_dict() if keeps_place(loader) else None,
        }
        return lambda: {**noted, "now": None if now is None else now()}

    @override
    def __next__(self) -> Any:
        if self._again and self._stream is not None:
            self._again -= 1
            with self._stream.drawn_from():
                batch = next(self._inner)
        else:
            batch = next(self._inner)
        self.drawn += 1
        self._keep(batch)
        return batch

    def _keep(self, batch: Any) -> None:
        if self.head is not None and len(self.head) < self._ahead:
            self.head.append(batch)

    def _states(self) -> list[Any]:
        return [rng.generator_state(source) for source in self._sources]
