"""Runs that go on from a checkpoint as if they had never been interrupted: random numbers and the place in the data.

What a checkpoint says beyond Lightning's own is under ``KEY``, and ``torch.load(weights_only=True)`` reads it::

    version     1
    world_size  number of ranks
    row         name of the placement row
    position    what of the fit is done: lightning_accel.strategies.progress
    reloaded    the epoch in which Lightning made the training loaders, if it makes them anew
    rng         for each rank: lightning_accel.core.rng
    loaders     for each rank: "train", for each training loader lightning_accel.strategies.places; "val", for each
                loader of validation whether it had persistent workers; "metrics", the trainer's callback_metrics;
                "logged", within an epoch: lightning_accel.strategies.logged

A rank that did not come to save it, as another one had failed, has None.

[Note: armed and live]
Lightning makes the iterators of the training data early, sometimes before it has restored its loops. From the set-up of
a fit that resumes until ``on_train_start`` there is a plan, and iterators are made as it says, with random numbers of
their own, as often as Lightning likes. ``on_train_start`` is the last thing before the next batch: there the loops'
counters are put right, the process gets its random numbers, and the plan is done with.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor

from lightning_accel.core import replay, rng
from lightning_accel.core.data_position import set_generators, shared
from lightning_accel.core.groups import absent_within
from lightning_accel.strategies.logged import EpochLog, Snapshot
from lightning_accel.strategies.places import Place, Places
from lightning_accel.strategies.plan import KEY, VERSION, Plan
from lightning_accel.strategies.progress import Position, begin_epoch

if TYPE_CHECKING:
    from lightning_accel.strategies.trainer import AccelStrategy
    from lightning_accel.strategies.xla import AccelXLAStrategy

_WAIT_S = 10.0
"""How long a rank that saves after an exception waits for the others."""
_UNTRUE = "You're resuming from a checkpoint that ended before the epoch ended"
"""How a warning of Lightning's begins that is about loaders which do not resume."""


@dataclass(frozen=True)
class _Window:
    """The first micro-batch of an optimizer step, before it was fetched."""

    batches: int
    state: rng.State
    place: Place
    logged: Snapshot


class Continuation:
    """Adds to checkpoints what it takes to go on exactly, and has a fit go on from one.

    With the same number of ranks a run goes on bit for bit: each rank has its random numbers and its samples. With
    another number the samples of the epoch that nobody has seen are shared by the new ranks, and none is seen twice.
    Ranks that were there before have their random numbers; those of further ranks follow from rank 0's and their own
    number.

    Not exact are random numbers that a loader's workers draw, the order of loaders with ``in_order=False``, and
    iterable datasets that draw from the same generator as training does. What is logged per epoch counts all of its
    batches, with another number of ranks those since the checkpoint. What callbacks set in ``on_train_epoch_start``
    they must save: as under Lightning, it is not called again within an epoch. A checkpoint made in ``on_fit_start`` of
    a run that goes on itself has no optimizer state, as Lightning has not loaded it yet.

    A checkpoint made while gradients accumulate goes back to the first of these micro-batches, whose gradients it does
    not have. Buffers which forward passes change, as those of batch normalisation, see these micro-batches twice.

    Args:
        strategy: Whose fits these are.
        gather: Sends an object to all ranks, and returns those of all, by rank; by default over the engine's process
            group or torch's.

    """

    def __init__(
        self, strategy: AccelStrategy | AccelXLAStrategy, gather: Callable[[Any], list[Any]] | None = None
    ) -> None:
        self._strategy = strategy
        self._gather_all = gather
        self._plan: Plan | None = None
        self._places: Places | None = None
        self._log: EpochLog | None = None
        self._window: _Window | None = None
        self._validation: tuple[rng.State, Snapshot] | None = None  # when it began
        self._last: Place | None = None  # when the last fit ended
        self._next: dict[int, replay.Beginning] = {}  # how iterators of the next epoch begin, by loader
        self._seeds: dict[int, int] = {}
        self._had_workers: list[bool] = []
        self.knows_order = False
        """Whether the fit goes on within an epoch whose samples ranks have shared by distributed samplers, in an order
        that only such samplers can go on with."""
        self._watched: list[weakref.ref[Any]] = []
        self._filter: Any = None

    # ------------------------------------------------------------------ saving

    def add_to(self, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint how to go on from it. All ranks take part, unless it has weights only."""
        if "optimizer_states" not in checkpoint:
            return
        position, own = self._now(Position.of(checkpoint["loops"]["fit_loop"], validating=self._is_validating))
        entries = self._gather(own)
        reloaded = self._trainer.fit_loop._last_train_dl_reload_epoch  # -inf before the first time
        checkpoint[KEY] = {
            "version": VERSION,
            "world_size": len(entries),
            "row": self._strategy.row.name,
            "position": asdict(position),
            "reloaded": reloaded if self._reloads and reloaded >= 0 else None,
            "rng": [entry and entry["rng"] for entry in entries],
            "loaders": [entry and {name: value for name, value in entry.items() if name != "rng"} for entry in entries],
        }

    def _now(self, position: Position) -> tuple[Position, dict[str, Any]]:
        """Where to go on from, and what of it differs between ranks."""
        places, plan = self._places, self._plan
        # Not trainer.callback_metrics: that may compute some, for which it waits for other ranks.
        known = self._trainer._logger_connector._callback_metrics.items()
        metrics = {name: value.detach().cpu().clone() for name, value in known if isinstance(value, Tensor)}
        own: dict[str, Any] = {"metrics": metrics, "val": [] if places is None else places.have_workers()}
        if plan is not None and plan.state is not None:  # nothing has happened yet
            before = {"metrics": plan.metrics, "rng": plan.state, "train": plan.train, "logged": plan.logged}
            return plan.position, {**own, **before}
        state: rng.State | None = None
        known_then: Snapshot | None = None
        place: Place | None
        if (window := self._open_window(position)) is not None:
            position = Position(epoch=position.epoch, batches=window.batches)
            state, place, known_then = window.state, window.place, window.logged
        else:
            place = self._place(position)
            is_validating = self._trainer.sanity_checking or (self._is_validating and not position.is_validated)
            if is_validating and self._validation is not None:
                state, known_then = self._validation  # it will be done again, or was not to change anything
        own["train"] = [] if place is None else place.positions()
        own["rng"] = rng.collect(self._strategy.root_device) if state is None else state
        own["logged"] = None if position.begins else (self._log or EpochLog(self._trainer)).saved(known_then)
        return position, own

    def _open_window(self, position: Position) -> _Window | None:
        """The beginning of an optimizer step whose gradients are not all there yet: the checkpoint has none of them."""
        window, module = self._window, self._strategy.lightning_module
        if window is None or position.begins or module is None or not module.automatic_optimization:
            return None
        over = position.batches % self._trainer.accumulate_grad_batches
        is_open = position.is_within_batch or (over > 0 and not position.is_last)
        return window if is_open and window.batches == position.batches - over else None

    def _place(self, position: Position) -> Place | None:
        """Where the training loaders were after the batches that are done."""
        now = None if self._places is None else self._places.now()
        if self._places is None or now is None:
            return self._last
        by_hand = isinstance(self._trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher)
        if position.begins or by_hand:  # a training_step may fetch as many batches as it likes
            return now
        return self._places.find(position.batches) or now

    def _gather(self, own: dict[str, Any]) -> list[dict[str, Any] | None]:
        """The entries of all ranks; only this one's if the others may not come."""
        if self._gather_all is not None:
            return self._gather_all(own)
        strategy: Any = self._strategy
        engine = strategy.engine
        if engine is not None and not engine.is_closed:
            if not strategy._is_interrupted or absent_within(_WAIT_S, engine.collectives.group) is None:
                return engine.collectives.gather_objects(own)
        elif not strategy._is_interrupted and dist.is_available() and dist.is_initialized():
            entries: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(entries, own)
            return entries
        return [own if rank == strategy.global_rank else None for rank in range(strategy.world_size)]

    # ---------------------------------------------------------------- resuming

    def take_up(self, trainer: pl.Trainer) -> None:
        """Call as a fit is set up, when its checkpoint has been read and its loops are not restored yet.

        Raises:
            ValueError: If the checkpoint's entry was written by a later version of this package.

        """
        self.end()
        self._last = None
        self._next, self._seeds, self._had_workers, self.knows_order = {}, {}, [], False
        self._places, self._log = Places(trainer), EpochLog(trainer)
        checkpoint = trainer._checkpoint_connector._loaded_checkpoint
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if not loops:
            return
        self._plan = plan = Plan.read(checkpoint, self._strategy.global_rank, self._strategy.world_size)
        self._seeds, self._had_workers = plan.seeds, plan.had_workers
        self.knows_order = not plan.position.begins and any(saved.get("order") for saved in plan.train)
        if plan.had is not None:
            loops["state_dict"].pop("combined_loader", None)  # rank 0's; each rank has its own
        plan.position.write(loops)
        self._places.ahead = plan.position.batches

    def start(self) -> None:
        """Call within ``on_train_start``. See [Note: armed and live].

        Raises:
            ValueError: If nobody can say which samples are next.

        """
        plan, places = self._plan, self._places
        if plan is None:
            return
        if plan.error is not None:
            raise plan.error
        assert places is not None
        fit = self._trainer.fit_loop
        combined = fit._combined_loader
        assert combined is not None
        self._trainer._logger_connector._callback_metrics.update(
            {name: value.to(self._strategy.root_device) for name, value in plan.metrics.items()}
        )
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler) and not plan.position.begins:
                callback.on_train_epoch_start(self._trainer)  # Lightning calls it for whole epochs only
        if plan.position.begins:
            self._start_epoch(plan)
        else:
            self._start_within_epoch(plan, places)
        if plan.reloaded is not None:
            fit._last_train_dl_reload_epoch = plan.reloaded
        for drawing in combined._iterator.iterators:  # type: ignore[union-attr]
            if isinstance(drawing, replay.Drawing):
                drawing.go_live()
        self._plan, places.ahead = None, 0
        if plan.state is not None:
            rng.restore(plan.stream.state, self._strategy.root_device)

    def _start_epoch(self, plan: Plan) -> None:
        """Have Lightning begin an epoch as it does after another: it makes the iterators then."""
        combined = self._trainer.fit_loop._combined_loader
        assert combined is not None
        begin_epoch(self._trainer, plan.position)
        if plan.position.epoch == 0:
            return  # what they have made already is used
        for index, (loader, saved) in enumerate(zip(combined.flattened, plan.train)):  # noqa: B905
            # It was told to go on from the end of an epoch. Some do, and have to notice that it is the end; others have
            # begun with the next one, which they shall when Lightning does.
            if saved["state"] is not None and next(combined._iterator.iterators[index], None) is not None:  # type: ignore[union-attr]
                position = {
                    "drawn": 0,
                    "generators": saved.get("generators_now", []),
                    "is_reset": bool(getattr(loader, "persistent_workers", False)),
                }
                self._next[index] = replay.Beginning(None, position, state=saved["state"])
            else:
                set_generators(loader, saved.get("generators_now", []))

    def _start_within_epoch(self, plan: Plan, places: Places) -> None:
        """Have Lightning go on after a batch, first with the validation that is due then."""
        fit, position = self._trainer.fit_loop, plan.position
        loop, combined, fetcher = fit.epoch_loop, fit._combined_loader, fit._data_fetcher
        assert combined is not None
        assert fetcher is not None
        if plan.left:
            self._count_anew(plan, places)
        iterator: Any = combined._iterator
        if plan.train and hasattr(iterator, "_consumed"):
            iterator._consumed = [saved["wrapped"] for saved in plan.train]
        fit._restarting = False  # or schedulers that follow a metric would be left out at the end of this epoch
        is_due = loop._should_check_val_fx(fetcher)
        loop.val_loop._has_run = False  # that of an earlier fit
        if is_due and not position.is_validated:
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        if not loop._should_accumulate():
            # A batch is counted when the validation after it is over, or left out as it was over before.
            loop._batches_that_stepped += (not position.is_counted) - is_due
        if loop.batch_progress.is_last_batch:
            # Lightning asks for one more batch; a loader that keeps its own place may have begun with the next epoch.
            fetcher.iterator = iter(())
            if isinstance(fetcher, _PrefetchDataFetcher):
                fetcher.batches = []
        if plan.logged is not None and self._log is not None:
            self._log.restore(plan.logged)
        if plan.had is not None and self._filter is None:
            warnings.filterwarnings("ignore", message=_UNTRUE)
            self._filter = warnings.filters[0]

    def _count_anew(self, plan: Plan, places: Places) -> None:
        """Count the batches that are done so that the epoch ends with the samples that are shared anew."""
        combined = self._trainer.fit_loop._combined_loader
        assert combined is not None
        left = places.left(
            plan.left, [saved["drawn"] for saved in plan.train], [saved["wrapped"] for saved in plan.train]
        )
        total = sized_len(combined)
        if left is None or total is None:
            return
        progress: Any = self._trainer.fit_loop.epoch_loop.batch_progress
        done = total - left
        progress.current.ready = progress.current.started = done
        progress.current.processed = progress.current.completed = done
        progress.is_last_batch = left == 0

    def end(self) -> None:
        """Call when a fit is over, or has failed."""
        if self._places is not None:
            self._last = self._places.now() or self._last
        for reference in self._watched:
            if (loader := reference()) is not None:
                replay.release(loader)
        self._watched.clear()
        self._plan = self._places = self._log = self._window = self._validation = None
        if self._filter is not None and self._filter in warnings.filters:
            warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
        self._filter = None

    # ----------------------------------------------------------------- loaders

    def follow(self, loader: Any) -> Any:
        """Watch a loader, if it is one of a fit. Returns what Lightning shall use."""
        if self._places is None:
            return loader
        loader = replay.watch(loader, self)
        self._watched.append(weakref.ref(loader))
        return loader

    def draw(self, drawing: replay.Drawing) -> None:
        """An iterator is about to be asked for a batch."""
        places = self._places
        if places is None or self._log is None or not places.keep(drawing):
            return
        window = self._trainer.accumulate_grad_batches
        # Not those that are ready: a training_step that fetches for itself is within the batch by then.
        progress: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        batches = progress.processed
        if batches % window == 0:
            place = places.find(batches)
            if place is not None:
                state = rng.collect(self._strategy.root_device)
                self._window = _Window(batches, state, place, self._log.now())

    def begin(self, loader: Any) -> replay.Beginning | None:
        """How an iterator of a watched loader is to be made."""
        places = self._places
        assert places is not None
        if (index := places.index_of(loader)) is not None:
            known = shared(loader)
            if known is not None and index in self._seeds:
                known.sampler.seed = self._seeds[index]
            combined = self._trainer.fit_loop._combined_loader
            assert combined is not None
            if self._plan is None:
                return self._next.pop(index, None)
            try:
                return self._plan.beginning(loader, index, combined)
            except (
                ValueError
            ) as error:  # raised here, it would be hidden by one of Lightning's, whose fetcher is not ready
                self._plan.error = self._plan.error or error
                return None
        index = places.index_in_validation(loader)
        if index == 0 and self._log is not None:
            self._validation = rng.collect(self._strategy.root_device), self._log.now()
        if index is not None and index < len(self._had_workers) and self._had_workers[index]:
            replay.start_workers(loader)
        return None

    # ---------------------------------------------------------------- Lightning

    @property
    def _trainer(self) -> pl.Trainer:
        module = self._strategy.lightning_module
        assert module is not None
        return module.trainer

    @property
    def _reloads(self) -> bool:
        """Whether Lightning makes the loaders anew after some epochs."""
        trainer: Any = self._trainer
        return bool(trainer.reload_dataloaders_every_n_epochs)

    @property
    def _is_validating(self) -> bool:
        state = self._trainer.state
        return state.fn == TrainerFn.FITTING and state.stage == RunningStage.VALIDATING
