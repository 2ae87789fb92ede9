"""``save_state`` and ``load_state``: what of a manual loop is in a checkpoint, and how it is put back.

A checkpoint is Fabric's with this project's strategies: a directory to which every rank writes its part (one file with
a strategy of ``state_dict_type="full"``), which loads under every row and number of ranks::

    model, model_1, …          in the order in which they were prepared
    optimizer, optimizer_1, …
    accelerator                schedulers, the loss scale, registered objects; by rank: random numbers, loaders' places

[Note: every rank]
A rank that saves alone, as in ``if accelerator.is_main_process: accelerator.save_state()``, would wait for ever, and
the others would take its messages for theirs. So the ranks meet first; who waits too long raises.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from lightning_accel.core import rng
from lightning_accel.core.checkpoint import is_directory, load
from lightning_accel.core.groups import absent_within
from lightning_accel.manual.accumulation import Accumulation
from lightning_accel.manual.optimizer import PreparedOptimizer
from lightning_accel.manual.peers import Peers
from lightning_accel.manual.scheduler import PreparedScheduler
from lightning_accel.strategies.engine_module import EngineModule
from lightning_accel.strategies.fabric import AccelFabricStrategy

OURS = "accelerator"
"""The entry of what neither a model nor an optimizer has."""
_FOLDER, _PATTERN = "checkpoints", re.compile(r"checkpoint_(\d+)")


@dataclass
class Prepared:
    """All that ``prepare`` has been given, in that order; and what was registered."""

    models: list[Any] = field(default_factory=list)
    """As returned."""
    engines: list[EngineModule] = field(default_factory=list)
    """Of the models."""
    optimizers: list[PreparedOptimizer] = field(default_factory=list)
    schedulers: list[PreparedScheduler] = field(default_factory=list)
    loaders: list[Any] = field(default_factory=list)
    registered: list[Any] = field(default_factory=list)

    def named(self) -> dict[str, Any]:
        """Models and optimizers by the names they have in a checkpoint."""
        models = {f"model_{index}" if index else "model": model for index, model in enumerate(self.models)}
        return models | {
            f"optimizer_{index}" if index else "optimizer": optimizer for index, optimizer in enumerate(self.optimizers)
        }

    def counts(self) -> dict[str, int]:
        """How many of each."""
        return {
            "models": len(self.models),
            "optimizers": len(self.optimizers),
            "schedulers": len(self.schedulers),
            "data loaders": len(self.loaders),
            "registered objects": len(self.registered),
        }


class States:
    """Saves and loads.

    Args:
        fabric: Lightning's Fabric.
        peers: The ranks.
        prepared: What is saved.
        accumulation: Where the loop is.
        project_dir: Where checkpoints go that get no path.
        limit: How many of those are kept; all if None.
        patience_s: How long, in seconds, ranks wait for each other.

    """

    def __init__(
        self,
        fabric: Fabric,
        peers: Peers,
        prepared: Prepared,
        accumulation: Accumulation,
        *,
        project_dir: Path | None,
        limit: int | None,
        patience_s: float,
    ) -> None:
        self._fabric = fabric
        self._peers = peers
        self._prepared = prepared
        self._accumulation = accumulation
        self._folder = None if project_dir is None else project_dir / _FOLDER
        self._limit = limit
        self._patience_s = patience_s

    @property
    def _strategy(self) -> AccelFabricStrategy:
        strategy = self._fabric.strategy
        assert isinstance(strategy, AccelFabricStrategy)
        return strategy

    def meet(self, doing: str) -> None:
        """Wait until all ranks are here. See [Note: every rank].

        Raises:
            RuntimeError: If some do not come, or each rank has a model of its own.

        """
        if any(module.engine.mesh.world.ranks < self._peers.ranks for module in self._prepared.engines):
            raise RuntimeError(
                f"Expected {doing} outside of a LocalSGD block, got it within one: each process has a model of its own"
                " there, and the checkpoint would have one of them. Call it after the block."
            )
        absent = absent_within(self._patience_s)  # over all ranks, whatever models there are
        if absent is not None:
            who = f"process{'es' if len(absent) > 1 else ''} {', '.join(map(str, absent))}" if absent else "some"
            raise RuntimeError(
                f"Expected every process to call {doing}, but process {self._peers.rank} has waited"
                f" {self._patience_s:g} s at most and not all of them came: {who} did not. Each has a part of the"
                " state: call it on all processes, not within `if accelerator.is_main_process`."
            )

    # -------------------------------------------------------------------- save

    def save(self, path: Path | None) -> str:
        """Save all. All ranks take part; see ``Accelerator.save_state``."""
        self.meet("save_state")
        if self._accumulation.is_open:
            warnings.warn(
                "save_state was called while gradients are accumulated: what these micro-batches have contributed is"
                " not saved, and a run that goes on from here will not have it. Save when sync_gradients is True.",
                stacklevel=3,
            )
        numbered = path is None
        target = str(self._next() if path is None else path)
        prepared, scaler = self._prepared, self._strategy.grad_scaler
        mine = {
            "rng": rng.collect(self._fabric.device),
            "loaders": [loader.state_dict() for loader in prepared.loaders],
        }
        everyone = self._peers.gather_objects(mine, "save_state")
        ours = {
            "counts": prepared.counts(),
            "schedulers": [scheduler.state_dict() for scheduler in prepared.schedulers],
            "scaler": None if scaler is None else scaler.state_dict(),
            "registered": [entry.state_dict() for entry in prepared.registered],
            "rng": [one["rng"] for one in everyone],
            "loaders": [one["loaders"] for one in everyone],
        }
        self._fabric.save(target, {**prepared.named(), OURS: ours})
        if numbered and self._limit is not None and self._peers.rank == 0:
            self._strategy._checkpoints.after_saving(self._forget_old)
        return target

    def _next(self) -> Path:
        """Where the next checkpoint goes; on all ranks the same."""
        if self._folder is None:
            raise ValueError(
                "Expected output_dir for save_state() without a project_dir. Pass one of them: save_state('path') or"
                " Accelerator(project_dir='path')."
            )
        self._strategy._checkpoints.finish()  # what is being written has its name when it is complete
        found = _numbered(self._folder)
        (number,) = self._peers.broadcast_objects([max(found, default=-1) + 1], 0)
        return self._folder / f"checkpoint_{number}"

    def _forget_old(self) -> None:
        assert self._folder is not None
        found = _numbered(self._folder)
        assert self._limit is not None
        for number in sorted(found)[: -self._limit]:
            old = found[number]
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()

    # -------------------------------------------------------------------- load

    def load(self, path: Path | None, *, strict: bool, weights_only: bool) -> str:
        """Load all. All ranks take part; see ``Accelerator.load_state``."""
        self.meet("load_state")
        source = str(self._latest() if path is None else path)
        if is_directory(source):  # before anything has changed
            self._require_fit(source, load(source, weights_only=weights_only))
        rest = self._fabric.load(source, self._prepared.named(), strict, weights_only=weights_only)
        if not is_directory(source):
            self._require_fit(source, {**rest, **self._prepared.named()})
        self._restore(rest[OURS])
        self._accumulation.reset()
        for optimizer in self._prepared.optimizers:
            optimizer.drop()  # what an open window has accumulated is of other parameters
        return source

    def _latest(self) -> Path:
        self._strategy._checkpoints.finish()
        found = {} if self._folder is None else _numbered(self._folder)
        (number,) = self._peers.broadcast_objects([max(found, default=-1)], 0)
        if self._folder is None or number < 0:
            raise ValueError(
                f"Expected input_dir for load_state(), as there are no checkpoints in {self._folder or 'a project_dir'}"
                " yet. Pass the path that save_state was given."
            )
        return self._folder / f"checkpoint_{number}"

    def _require_fit(self, source: str, found: Mapping[str, Any]) -> None:
        if OURS not in found:
            raise ValueError(
                f"Expected a checkpoint that save_state has written, got {source} with the entries"
                f" {', '.join(map(repr, found))}. Models and optimizers of others: accelerator.fabric.load(path, ...)."
            )
        saved, have = found[OURS]["counts"], self._prepared.counts()
        if differing := [kind for kind, count in have.items() if saved.get(kind, 0) != count]:
            said = ", ".join(f"{saved.get(kind, 0)} {kind} (here {have[kind]})" for kind in differing)
            raise ValueError(
                f"Expected as much to be prepared as when {source} was saved, which has {said}. Prepare and register"
                " the same objects, in the same order, before load_state."
            )

    def _restore(self, ours: Mapping[str, Any]) -> None:
        prepared, scaler, rank = self._prepared, self._strategy.grad_scaler, self._peers.rank
        for scheduler, state in zip(prepared.schedulers, ours["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        if scaler is not None and ours["scaler"] is not None:
            scaler.load_state_dict(ours["scaler"])
        for entry, state in zip(prepared.registered, ours["registered"], strict=True):
            entry.load_state_dict(state)
        there = rank < len(ours["rng"])
        for loader, state in zip(prepared.loaders, ours["loaders"][rank if there else 0], strict=True):
            loader.load_state_dict(state)
        state = ours["rng"][rank] if there else rng.derive(ours["rng"][0], rank)
        rng.restore(state, self._fabric.device)


def _numbered(folder: Path) -> dict[int, Path]:
    """The checkpoints that were named by their number."""
    if not folder.is_dir():
        return {}
    matches = ((entry, _PATTERN.fullmatch(entry.name)) for entry in folder.iterdir())
    return {int(match.group(1)): entry for entry, match in matches if match}


def require_stateful(objects: Sequence[Any]) -> None:
    """Raise if something has no state to save.

    Raises:
        ValueError: Names the classes.

    """
    wrong = [
        type(entry).__name__
        for entry in objects
        if not all(callable(getattr(entry, name, None)) for name in ("state_dict", "load_state_dict"))
    ]
    if wrong:
        raise ValueError(
            "Expected objects with state_dict and load_state_dict to register for checkpointing, got"
            f" {', '.join(wrong)}. Add the two methods to the class."
        )
