"""Saves checkpoints: all ranks agree on who writes what, each writes its part, and rank 0 makes it a checkpoint.

::

    all ranks    describe their parts          one gather of plans (or of "as last time")
    rank 0       temporary folder
    all ranks    write and fsync their files   asynchronously: in a thread, from a copy
    all ranks    what was written, or why not  one gather: all fail together, or none
    rank 0       .metadata, meta.pt, manifest; the folder gets its name
    all ranks    whether that worked           one gather

[Note: saving in the background]
The thread gathers on a process group of its own, so that its messages never meet those of training. The step waits for
the copy to host memory only. Whatever goes wrong is raised where all ranks ask next: at the next optimizer step, at the
next save, or at the end.
"""

from __future__ import annotations

import atexit
import dataclasses
import io
import os
import pickle
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from lightning_accel.core.checkpoint.manifest import File, Manifest
from lightning_accel.core.checkpoint.metadata import METADATA_FILE
from lightning_accel.core.checkpoint.nest import Path, take_tensors
from lightning_accel.core.checkpoint.place import RUN, Place
from lightning_accel.core.checkpoint.reader import OBJECTS_FILE
from lightning_accel.core.checkpoint.shard import Part, Shard
from lightning_accel.core.checkpoint.writing import Kept, Written, host_copies, write_file, write_frozen

Gather = Callable[[Any], list[Any]]
"""Sends an object to all ranks; returns everyone's."""


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Who writes what."""

    described: SavePlan
    """What this rank has."""
    paths: dict[str, Path]
    """Of all tensors in the checkpoint's dictionaries, by their names in its files."""
    mine: list[MetadataIndex]
    """What this rank writes."""
    metadata: Metadata
    """Of the whole checkpoint."""


class Saver:
    """Saves the checkpoints of one run.

    Args:
        gather: Sends an object to all ranks; a process alone if not given.
        rank: This one.
        group: Of the same ranks, for saving in the background.

    """

    def __init__(self, gather: Gather = _alone, rank: int = 0, group: dist.ProcessGroup | None = None) -> None:
        self._gather = gather
        self._rank = rank
        self._group = group
        self._beside: Gather | None = None
        self._run: str | None = None
        self._last: _Plan | None = None
        self._kept: Kept | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._reports = False
        self._lock = threading.Lock()
        self._afterwards: list[Callable[[], None]] | None = None

    def save(
        self,
        path: str | os.PathLike[str],
        nest: Any,
        *,
        info: Mapping[str, Any] | None = None,
        background: bool = False,
    ) -> None:
        """Save a checkpoint directory. All ranks take part.

        Args:
            path: Of the directory, or its URL; on all ranks the same, and on all of them the same file system. What is
                there is replaced when the new one is complete.
            nest: Dictionaries and lists. What ranks have parts of is a ``Shard`` in each of theirs; all else is rank
                0's.
            info: What the manifest is to say about it; JSON.
            background: Return when a copy is made, and write while training goes on. See ``check`` and ``finish``.

        Raises:
            ValueError: If another run writes there.
            OSError: If any rank could not write. What was there before is still there.
            Exception: What an earlier save in the background has failed with.

        """
        self.finish()
        tensors, objects = take_tensors(nest)
        place, content = self._begin(path, objects)
        plan = self._plan(tensors)
        parts = _parts(tensors)
        mine = [(index, parts[index][0]) for index in plan.mine]
        frozen = {index for index in plan.mine if parts[index][1]}
        manifest = self._info(info or {})
        if not background:
            self._write(self._gather, place, plan, dict(mine), frozen, content, manifest)
            return
        gather, copies = self._gather_beside(), host_copies(mine)

        def write() -> None:
            try:
                self._write(gather, place, plan, copies, frozen, content, manifest)
                copies.clear()
                with self._lock:
                    afterwards, self._afterwards = self._afterwards or [], None
                for action in afterwards:
                    action()
            except BaseException as error:
                self._error = error

        self._afterwards = []
        if not self._reports:
            self._reports = True
            atexit.register(_report, weakref.ref(self))
        self._thread = threading.Thread(target=write, name="lightning_accel checkpoint")
        self._thread.start()

    def after(self, action: Callable[[], None]) -> None:
        """Do something now or, if a save is under way in the background, when it has succeeded."""
        with self._lock:
            if self._afterwards is not None:
                self._afterwards.append(action)
                return
        action()

    def check(self) -> None:
        """Raise what a save in the background has failed with, if it has. All ranks call this together.

        While nothing is being saved this does nothing. Otherwise the ranks compare notes: a failure must not end one
        of them while others, whose threads have not heard of it yet, go on to the next step and wait for it there.

        Raises:
            Exception: On all ranks, if any of them has failed.

        """
        if self._thread is None:
            return
        is_over = not self._thread.is_alive()
        everyone = self._gather((is_over, _sendable(self._error)))
        first = next((error for _, error in everyone if error is not None), None)
        if first is not None or all(over for over, _ in everyone):
            self.finish()
            if first is not None:
                raise first

    def finish(self) -> None:
        """Wait for a save in the background.

        Raises:
            Exception: What it has failed with.

        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._afterwards = None  # if it has failed, what was there before stays
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def is_saving(self) -> bool:
        """Whether a save in the background has not been waited for."""
        return self._thread is not None

    # ------------------------------------------------------------------- steps

    def _begin(self, path: str | os.PathLike[str], objects: Any) -> tuple[Place, bytes]:
        """Have a folder to write to, and the bytes of what is no tensor."""
        content = io.BytesIO()
        error: BaseException | None = None
        place = Place(path, self._run or RUN)
        if self._rank == 0:
            try:
                torch.save(objects, content)
                place.begin()
            except Exception as raised:
                error = raised
        answers = self._gather((RUN, _sendable(error), str(place.final)))
        self._run = answers[0][0]
        if answers[0][1] is not None:
            raise error or answers[0][1]
        if len({where for *_, where in answers}) > 1:
            if self._rank == 0:
                place.abandon()
            raise ValueError(
                f"Expected the same path on all ranks, got {[where for *_, where in answers]}. Make it of what is the"
                " same on all of them (no local time, no random number), or broadcast it."
            )
        place = Place(path, answers[0][0])
        there = self._gather(place.temporary.exists())
        if place.final.is_local and not all(there):
            if self._rank == 0:
                place.abandon()
            raise ValueError(
                f"Expected {place.final} to be on a file system that all ranks share, but ranks"
                f" {[rank for rank, found in enumerate(there) if not found]} do not see what rank 0 has made there."
                " Save to a shared folder, or whole checkpoints with state_dict_type='full'."
            )
        return place, content.getvalue()

    def _plan(self, tensors: Mapping[Path, Shard]) -> _Plan:
        """Have all ranks agree on who writes what."""
        names: dict[Path, str] = {path: ".".join(map(str, path)) for path in tensors}
        assert len(set(names.values())) == len(names), "two paths of one name"
        canonical: dict[int, str] = {}
        state: dict[str, Shard] = {}
        aliases: dict[str, str] = {}
        for path, shard in tensors.items():
            first = canonical.setdefault(id(shard), names[path])
            if first == names[path]:
                state[first] = shard
            else:
                aliases[names[path]] = first
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(state, is_coordinator=self._rank == 0)
        paths = {name: path for path, name in names.items()}
        described = dataclasses.replace(planner.create_local_plan(), planner_data=(paths, aliases))
        same = self._last is not None and self._last.described == described
        if all(self._gather(same)):
            assert self._last is not None
            return self._last
        everyone = self._gather(described)
        plans, metadata = planner.create_global_plan(everyone)
        all_paths: dict[str, Path] = {}
        for plan in everyone:
            all_paths |= plan.planner_data[0]
            for alias, first in plan.planner_data[1].items():
                metadata.state_dict_metadata[alias] = metadata.state_dict_metadata[first]
        metadata.planner_data = all_paths
        mine = [item.index for item in plans[self._rank].items]
        self._last = _Plan(described, all_paths, mine, metadata)
        return self._last

    def _info(self, given: Mapping[str, Any]) -> dict[str, Any]:
        from lightning_accel import __version__

        now = time.time()
        return {
            **given,
            "lightning_accel": __version__,
            "torch": torch.__version__,
            "created": datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="seconds"),
            "time": now,
            "run": self._run,
        }

    def _write(
        self,
        gather: Gather,
        place: Place,
        plan: _Plan,
        parts: Mapping[MetadataIndex, Part],
        frozen: set[MetadataIndex],
        content: bytes,
        info: dict[str, Any],
    ) -> None:
        folder = place.temporary
        written = Written()
        kept: Kept | None = None
        error: BaseException | None = None
        try:
            trained = {index: part for index, part in parts.items() if index not in frozen}
            written = write_file(folder, f"__{self._rank}_0.distcp", trained)
            still = {index: part for index, part in parts.items() if index in frozen}
            more, kept = write_frozen(folder, f"__{self._rank}_1.distcp", still, self._kept, place.final.path)
            written.places |= more.places
            written.files |= more.files
            folder.sync()
        except Exception as raised:
            error = raised
        everyone: list[tuple[Written, Exception | None]] = gather((written, _sendable(error)))
        self._raise_first([failed for _, failed in everyone], error, place)
        if self._rank == 0:
            try:
                self._complete(place, plan, [done for done, _ in everyone], content, info)
            except Exception as raised:
                error = raised
        self._raise_first(gather(_sendable(error)), error, place)
        self._kept = kept

    def _complete(
        self, place: Place, plan: _Plan, everyone: list[Written], content: bytes, info: dict[str, Any]
    ) -> None:
        """Make a checkpoint of what all ranks have written."""
        places: dict[MetadataIndex, Any] = {}
        files: dict[str, File] = {}
        for written in everyone:
            places |= written.places
            files |= written.files
        _alias(plan, places)
        metadata = dataclasses.replace(plan.metadata, storage_data=places)
        for name, body in ((METADATA_FILE, pickle.dumps(metadata)), (OBJECTS_FILE, content)):
            place.temporary.write(name, body)
            files[name] = File.of(body)
        place.complete(Manifest(files, {**info, "world_size": len(everyone)}))

    def _raise_first(self, everyone: list[Exception | None], own: BaseException | None, place: Place) -> None:
        """Raise on all ranks what the first of them has failed with."""
        failed = [(rank, error) for rank, error in enumerate(everyone) if error is not None]
        if not failed:
            return
        if self._rank == 0:
            place.abandon()
        rank, error = failed[0]
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"Rank {rank} could not write the checkpoint {place.final}: {error.strerror or error}. What was there"
                f" before is still there. Free space on the disk of {place.final}, or save elsewhere",
            ) from own
        raise RuntimeError(f"Rank {rank} could not write the checkpoint {place.final}: {error!r}") from (own or error)

    def _gather_beside(self) -> Gather:
        """Gather in the background. All ranks take part in the first call."""
        if self._beside is None:
            ranks = len(self._gather(None))
            if ranks == 1:
                self._beside = _alone
            else:
                group = dist.new_group(dist.get_process_group_ranks(self._group), backend="gloo")

                def gather(value: Any) -> list[Any]:
                    found: list[Any] = [None] * ranks
                    dist.all_gather_object(found, value, group=group)
                    return found

                self._beside = gather
        return self._beside


def _report(reference: weakref.ref[Saver]) -> None:
    """At exit: nobody may have asked for what the last save in the background has failed with."""
    saver = reference()
    error = None if saver is None else saver._error
    if error is not None:
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1)


def _parts(tensors: Mapping[Path, Shard]) -> dict[MetadataIndex, tuple[Part, bool]]:
    """The parts that this rank has, by what torch.distributed.checkpoint calls them; and whether they are frozen."""
    found: dict[MetadataIndex, tuple[Part, bool]] = {}
    for path, shard in tensors.items():
        name = ".".join(map(str, path))
        for box, values in shard.parts.values():
            found[MetadataIndex(name, box.offsets)] = values, shard.frozen
    return found


def _alias(plan: _Plan, places: dict[MetadataIndex, Any]) -> None:
    """Have tensors of several names found under each of them."""
    for other, first in plan.described.planner_data[1].items():
        kind = plan.metadata.state_dict_metadata[first]
        assert isinstance(kind, TensorStorageMetadata)
        for chunk in kind.chunks:
            places[MetadataIndex(other, chunk.offsets)] = places[MetadataIndex(first, chunk.offsets)]


def _sendable(error: BaseException | None) -> BaseException | None:
    """An error that other ranks can read."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
