"""A loader of one rank's share of the batches that all ranks go through together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_accel.data.batches import to_device
from lightning_accel.data.passes import Feed, Pass, SentFeed, is_iterable
from lightning_accel.data.shuffling import Alike, SeededSampler
from lightning_accel.data.wire import Delivery

_VERSION = 1


class Watcher(Protocol):
    """Who is told of iterations."""

    def began(self, loader: ShardedLoader) -> None:
        """An iteration has begun."""

    def ended(self, loader: ShardedLoader) -> None:
        """It is over: at its end, or left."""


class Joins(Protocol):
    """Has all ranks come to the end of their batches together."""

    is_shadow: bool

    def run(self, deliveries: Iterator[Delivery]) -> Iterator[Delivery]:
        """This rank's batches, and others in their place until all ranks have come to their last."""


class LoaderView(DataLoader[Any]):
    """A loader that stands for another one, whose attributes it has.

    Args:
        loader: The other.

    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        # Not the base's: all that it would set up is the other's.
        self.viewed = loader

    def __getattr__(self, name: str) -> Any:
        if name == "viewed":  # within pickle and copy
            raise AttributeError(name)
        return getattr(self.viewed, name)

    @override
    def __len__(self) -> int:
        return len(self.viewed)


class ShardedLoader(LoaderView):
    """One rank's batches of a loader that all ranks have; ``prepare_data_loader`` makes it.

    Each iteration is another epoch, with another order if the loader shuffles, whether the last came to its end or not.
    All ranks iterate equally often.

    Args:
        feed: Where batches come from.
        rank: Which rank.
        ranks: Of how many.
        seed: What orders depend on besides the epoch.
        dataset: Of all samples.
        shuffled: What draws orders; told of seeds and epochs.
        device: Where batches are brought; None: nowhere.
        non_blocking: Do not wait for that.
        total_batch_size: Samples of a round of all ranks; None if batches differ.
        watcher: Who is told of iterations.

    """

    def __init__(
        self,
        feed: Feed,
        *,
        rank: int,
        ranks: int,
        seed: int,
        dataset: Any,
        shuffled: list[SeededSampler | Alike],
        device: torch.device | None,
        non_blocking: bool,
        total_batch_size: int | None,
        watcher: Watcher | None,
    ) -> None:
        super().__init__(feed.loader)
        self._feed = feed
        self.dataset = dataset
        """Of all samples of all ranks."""
        self.rank, self.ranks = rank, ranks
        self._seed, self._shuffled = seed, shuffled
        self.device, self.non_blocking = device, non_blocking
        self.total_batch_size = total_batch_size
        """Samples that all ranks get together in a round; None if batches differ in size."""
        self.watcher = watcher
        self.epoch = 0
        """Which epoch the next iteration is."""
        self.end_of_dataloader = False
        """Whether the batch that was handed out is the last, until the iteration is over."""
        self.remainder = -1
        """With the last batch: how many samples of the last round, in the order of ranks, are no duplicates. -1 if all
        are, or nobody knows."""
        self.joining: Joins | None = None
        """Where ranks may have different numbers of batches: what has them end together."""
        self._passing: Pass | None = None  # what a state is of
        self._latest: Pass | None = None
        self._loaded: Mapping[str, Any] | None = None  # what to go on from

    # --------------------------------------------------------------- iteration

    @override
    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return len(self._feed)

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self.after(0)

    def after(self, skipped: int) -> Iterator[Any]:
        """The batches of an epoch without the first few.

        Args:
            skipped: How many of this rank's are left out, from the epoch's start on; those of other ranks are, too.
                What a loaded state is already behind counts among them.

        """
        passing = self._begin(skipped)
        self._passing = self._latest = passing
        self.end_of_dataloader, self.remainder = False, -1
        if self.watcher is not None:
            self.watcher.began(self)
        try:
            deliveries = iter(passing)
            for delivery in deliveries if self.joining is None else self.joining.run(deliveries):
                if delivery.is_last:
                    self.end_of_dataloader, self.remainder = True, delivery.remainder
                batch = delivery.batch
                if self.device is not None:
                    batch = to_device(batch, self.device, non_blocking=self.non_blocking)
                yield batch
        finally:
            if self._latest is passing:  # not an older one that is given up only now
                self._passing = None
                self.end_of_dataloader, self.remainder = False, -1
                if self.watcher is not None:
                    self.watcher.ended(self)

    def _begin(self, skipped: int) -> Pass:
        """The pass that comes next."""
        loaded, self._loaded = self._loaded, None
        epoch, self.epoch = self.epoch, self.epoch + 1
        self._feed.set_epoch(epoch)
        for source in self._shuffled:
            source.epoch = epoch
        began, position, mark = 0, 0, None
        if loaded is not None:
            began, position, mark = loaded["began"], loaded["position"], loaded["mark"]
            if mark is not None and loaded["ranks"] != self.ranks and self._feed.is_indexed:
                mark = {**mark, "state": None}
            # From the epoch's start on: what was handed out before the state was saved is left out already.
            skipped = max(0, skipped - position // self._feed.per_round)
        keeps_place = mark is not None and mark["state"] is not None
        if self._feed.is_indexed:
            position += skipped * self._feed.per_round if loaded is None else 0
            began = began if keeps_place else position
            self._feed.start_at(began)
            skipped = 0 if loaded is None else skipped
        passing = Pass(self._feed, epoch, began=began, position=position, mark=mark, skip=skipped)
        passing.position += skipped * self._feed.per_round
        return passing

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is: the order of samples depends on it.

        Args:
            epoch: From 0 on. If another one was to be gone on with, it is begun from its start.

        """
        if self._loaded is not None and self._loaded["epoch"] != epoch:
            self._loaded = None
        self.epoch = epoch

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on after the batches that were handed out, for ``load_state_dict``.

        Within an iteration that is with the next batch (none, after the last one); otherwise with the next epoch. Each
        rank saves its own. Positions and orders are the same on all ranks, so that a rank which was not there before
        can load rank 0's.

        Returns:
            Numbers, texts and tensors: ``torch.load(weights_only=True)`` reads it. Of a loader that keeps its own place
            (torchdata's), what that says is in it.

        """
        state = {"version": _VERSION, "ranks": self.ranks, "seed": self._seed}
        if self._loaded is not None:
            return {**self._loaded, **state, "ranks": self._loaded["ranks"]}
        passing = self._passing
        if passing is None:
            generators = self._feed.generators()
            return {
                **state,
                "epoch": self.epoch,
                "began": None,
                "position": None,
                "mark": None,
                "generators": generators,
            }
        return {
            **state,
            "epoch": passing.epoch,
            "began": passing.began,
            "position": passing.position,
            "mark": None if passing.mark is None else passing.mark(),
            "generators": None,  # in the mark
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration go on from a state: with the samples that nobody has seen, in the same order.

        The number of ranks and the batch size may be others if the dataset has indices. With the same number the
        random numbers that loading draws are those of the first time as well.

        Args:
            state: From ``state_dict``.

        Raises:
            ValueError: If it is of a later version, or the number of ranks is another and every rank goes through an
                iterable dataset by itself.

        """
        if state.get("version") != _VERSION:
            raise ValueError(
                f"Expected the state of a loader of version {_VERSION}, got {state.get('version')!r}. It was saved by"
                " something else, or by a later version of this package."
            )
        within = state["position"] is not None
        others = state["ranks"] != self.ranks
        if within and others and is_iterable(self._feed.loader) and not self.is_dispatched:
            raise ValueError(
                f"Expected {state['ranks']} ranks, as when the state was saved, got {self.ranks}: every rank goes"
                " through the iterable dataset by itself, and nobody can tell what others have seen. Use"
                " dispatch_batches=True, or resume at the end of an epoch."
            )
        if within and not self._feed.is_indexed and state["mark"] is None and self.rank == 0:
            raise ValueError("Expected rank 0 to load its own state: only that says where the dataset was.")
        self._passing = None
        self.epoch = state["epoch"]
        self._loaded = dict(state) if within else None
        if not within:
            self._feed.set_generators(state["generators"])
        self._seed = state["seed"]
        for source in self._shuffled:
            source.seed = self._seed

    # --------------------------------------------------------------- as loaders

    @property
    def even_batches(self) -> bool:
        """Whether the last round is completed with samples from the start of the epoch. May be set between epochs."""
        return self._feed.even_batches

    @even_batches.setter
    def even_batches(self, even: bool) -> None:
        self._feed.even_batches = even

    @property
    def goes_on(self) -> bool:
        """Whether the next iteration goes on within an epoch, from a state that was loaded."""
        return self._loaded is not None

    @property
    def is_shadow(self) -> bool:
        """Whether this rank has run out in a joined loop: the batch counts nothing. See ``join_uneven_inputs``."""
        return self.joining is not None and self.joining.is_shadow

    @property
    def is_dispatched(self) -> bool:
        """Whether rank 0 loads for all."""
        return isinstance(self._feed, SentFeed)

    @property
    def seed(self) -> int:
        """What orders depend on, besides the epoch."""
        return self._seed

    def __reduce__(self) -> Any:
        raise TypeError(
            "Expected what is pickled or copied to hold no prepared loader, which belongs to this process and its"
            " ranks. Save loader.state_dict()."
        )


class SkippedLoader(LoaderView):
    """A loader whose next iteration leaves the first batches out, and further ones do not.

    [Note: none to skip]
    Loops for Accelerate compute where they go on: ``epoch, batch = divmod(step, len(loader))``. After an epoch's last
    batch that is the next epoch, without a batch to skip; a state that was saved there has nothing left of its epoch.
    So who skips 0 batches has the next epoch then, not a loop without a batch: an epoch would be missing in the end.

    Args:
        loader: The loader.
        batches: How many.

    """

    def __init__(self, loader: DataLoader[Any], batches: int) -> None:
        super().__init__(loader)
        self.left_out = batches
        self._is_new = True

    @override
    def __len__(self) -> int:
        """Batches of the next iteration."""
        return max(0, len(self.viewed) - self.left_out)

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skipped, self.left_out = self.left_out, 0
        is_new, self._is_new = self._is_new, False
        assert isinstance(self.viewed, ShardedLoader)
        if is_new and not skipped and self.viewed.goes_on:
            return _rest_or_next(self.viewed)
        return self.viewed.after(skipped)


def _rest_or_next(loader: ShardedLoader) -> Iterator[Any]:
    """What a loaded state has left of its epoch; if that is nothing, the next one. See [Note: none to skip]."""
    is_over = True
    for batch in loader.after(0):
        is_over = False
        yield batch
    if is_over:
        yield from loader.after(0)
