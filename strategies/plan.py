"""How a fit goes on: from which batch, with which samples on this rank, and with which random numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_accel.core import replay, rng
from lightning_accel.core.data_position import Shared, batch_size_of, shared
from lightning_accel.strategies.progress import Position

KEY = "lightning_accel"
"""Where a checkpoint has what this package adds."""
VERSION = 1
"""Of what it adds."""


@dataclass
class Plan:
    """How a fit goes on."""

    position: Position
    world_size: int
    """The number of ranks now."""
    had: int | None = None
    """How many there were. None if the checkpoint says neither that nor what follows."""
    reloaded: float | None = None
    """The epoch in which Lightning made the training loaders, if it makes them anew after some epochs."""
    state: Mapping[str, Any] | None = None
    """Of this rank's random numbers."""
    train: list[dict[str, Any]] = field(default_factory=list)
    """Where the training loaders were."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What callbacks and schedulers could see of metrics."""
    logged: Mapping[str, Any] | None = None
    """What this rank had logged in the epoch; None where it begins, or nobody knows."""
    had_workers: list[bool] = field(default_factory=list)
    """Which of the loaders for validation had persistent workers."""
    stream: rng.Stream = field(default_factory=rng.Stream)
    """Random numbers of what has yet to be done of what comes before the next batch."""
    error: Exception | None = None
    """Why nobody can go on."""
    left: dict[int, int] = field(default_factory=dict)
    """Batches that are left of the training loaders whose samples are shared anew, by index."""

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any], rank: int, world_size: int) -> Plan:
        """What a checkpoint says to this rank; in one that says nothing, Lightning's loops do.

        A rank that was there has its own random numbers and places in the data. If there was another number of ranks
        all have rank 0's places, and the random numbers of further ranks are derived from rank 0's.

        Raises:
            ValueError: If it was written by a later version of this package.

        """
        saved = checkpoint.get(KEY)
        if saved is None:
            return cls(Position.of(checkpoint["loops"]["fit_loop"]), world_size)
        if saved["version"] > VERSION:
            raise ValueError(
                f"Expected a checkpoint whose entry {KEY!r} is of version {VERSION} or before, got version"
                f" {saved['version']}: a later version of lightning-accel has made it. Update this package."
            )
        states, loaders = saved["rng"], saved["loaders"]
        state = states[rank] if rank < len(states) else None
        if state is None:
            if rank < len(states):
                warnings.warn(
                    f"The checkpoint has no random numbers of rank {rank}, which did not come to save it as a rank had"
                    " failed: its next ones differ from those that would have been.",
                    stacklevel=2,
                )
            state = rng.derive(states[0], rank)
        has_own = saved["world_size"] == world_size and loaders[rank] is not None
        own = loaders[rank if has_own else 0]
        return cls(
            Position(**saved["position"]),
            world_size,
            had=saved["world_size"],
            reloaded=saved["reloaded"],
            state=state,
            train=own["train"],
            metrics=own["metrics"],
            logged=own.get("logged") if has_own else None,
            had_workers=own["val"],
            stream=rng.Stream(state),
        )

    @property
    def seeds(self) -> dict[int, int]:
        """Seeds of the training loaders' distributed samplers, by index."""
        orders = {index: saved.get("order") for index, saved in enumerate(self.train)}
        return {index: order["seed"] for index, order in orders.items() if order and order["seed"] is not None}

    def beginning(self, loader: Any, index: int, combined: CombinedLoader) -> replay.Beginning | None:
        """How the next iterator of a training loader is to be made; None: as ever.

        A loader that keeps its own place is told it.

        Args:
            loader: It is watched.
            index: Which of the training loaders.
            combined: All of them.

        Raises:
            ValueError: If nobody can say which samples are next.

        """
        position = self.position
        if self.had is None:
            return self._skip(loader, combined)
        if index >= len(self.train):
            if not position.begins:
                raise ValueError(
                    f"Expected {len(self.train)} training loaders, as when the checkpoint was made in the middle of"
                    f" epoch {position.epoch}, got {len(combined.flattened)}. Resume with the same loaders, or from a"
                    " checkpoint of the end of an epoch."
                )
            return replay.Beginning(self.stream) if position.epoch == 0 else None
        saved = self.train[index]
        if "made" not in saved and saved["state"] is None:  # its iterator was made when nobody watched it
            return self._skip(loader, combined)
        if position.begins:
            if position.epoch == 0 and saved.get("drawn") == 0:
                return replay.Beginning(rng.Stream(saved["made"]), saved, state=saved["state"])
            if saved["state"] is not None:
                loader.load_state_dict(saved["state"])
            return None
        _set_sampler_epoch(loader, position.epoch)
        known = shared(loader)
        start = self._shared_anew(loader, saved, known)
        if start is None and saved["state"] is not None:
            return replay.Beginning(rng.Stream(saved["made"]), saved, state=saved["state"])
        if start is not None:
            assert known is not None
            limit = math.inf if combined.limits is None else combined.limits[index]
            self.left[index] = 0 if position.is_last else known.shares.batches_within(limit, start)
        return replay.Beginning(rng.Stream(saved["made"]), saved, start)

    def _shared_anew(self, loader: Any, saved: Mapping[str, Any], known: Shared | None) -> int | None:
        """The place in the common order from which the ranks share it in another way than before; None: as before."""
        order = saved["order"]
        if order is None or known is None:
            self._require_same(loader, saved)
            return None
        now = known.described()
        if any(order[name] != now[name] for name in ("size", "shuffle")):
            rank_zero_warn(
                f"The checkpoint was made in the middle of an epoch of {order['size']} samples"
                f" (shuffle={order['shuffle']}); now there are {now['size']} (shuffle={now['shuffle']}). The order is"
                " another one: samples of this epoch will be repeated or left out."
            )
        is_same = all(order[name] == now[name] for name in ("ranks", "batch_size", "drop_last", "drop_last_batch"))
        place: int = order["end"]
        return None if is_same and order["start"] == 0 else place

    def _require_same(self, loader: Any, saved: Mapping[str, Any]) -> None:
        """Raise if the samples of an order that nobody knows would have to be shared anew.

        An error and not a warning: a run that repeats or loses samples looks like any other.
        """
        batch_size = batch_size_of(loader)
        if saved["drawn"] == 0 or (self.had == self.world_size and saved["batch_size"] == batch_size):
            return
        had = f"{self.had} ranks with batch_size={saved['batch_size']}"
        raise ValueError(
            f"Expected {had}, as when the checkpoint was made in the middle of epoch {self.position.epoch}, got"
            f" {self.world_size} with batch_size={batch_size}. Which samples the {type(loader).__name__} has yet to"
            f" give cannot be told, as ranks do not share its samples by a DistributedSampler. Resume on {had}, or from"
            " a checkpoint of the end of an epoch. To have each rank skip as many batches as before, and repeat or lose"
            f" samples, delete {KEY!r} from the checkpoint in on_load_checkpoint."
        )

    def _skip(self, loader: Any, combined: CombinedLoader) -> replay.Beginning | None:
        """As well as can be if nothing is known but how many batches are done."""
        position = self.position
        if position.begins or isinstance(loader, _Stateful):
            return None
        _set_sampler_epoch(loader, position.epoch)
        rank_zero_warn(
            "The checkpoint was made in the middle of an epoch and not by a strategy of this package, so nobody knows"
            f" by how many ranks and in which order its first {position.batches} batches were taken. Each rank skips"
            " as many batches of its own order. That is right if the number of ranks, the batch size and the sampler"
            " are the same now, and the order depends on the sampler's seed and the epoch only."
        )
        drawn, length = position.batches, sized_len(loader)
        if length and drawn > length:
            drawn = (drawn - 1) % length + 1 if combined._mode == "max_size_cycle" else length
        stream = rng.Stream()
        return replay.Beginning(stream, replay.after(drawn, stream.state))
