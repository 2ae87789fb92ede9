"""Saves checkpoints: all ranks agree on who writes what, each writes its part, and rank 0 makes it a checkpoint.

::

    all ranks    describe their parts
    rank 0       temporary folder              one gather: all fail together, or none
    all ranks    see it                        one gather, with plans (or "as last time")
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

import dataclasses
import importlib.metadata
import io
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.manifest import File, Manifest
from lightning_accel.core.checkpoint.metadata import METADATA_FILE
from lightning_accel.core.checkpoint.nest import Path, take_tensors
from lightning_accel.core.checkpoint.place import Place
from lightning_accel.core.checkpoint.reader import OBJECTS_FILE
from lightning_accel.core.checkpoint.run import this_run
from lightning_accel.core.checkpoint.shard import Part, Shard
from lightning_accel.core.checkpoint.writing import Kept, Written, host_copies, write_file, write_frozen
from lightning_accel.core.groups import host_backend

T = TypeVar("T")

Gather = Callable[[Any], list[Any]]
"""Sends an object to all ranks; returns everyone's."""


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Who writes what."""

    described: SavePlan
    """What this rank has."""
    aliases: dict[str, str]
    """Other names of tensors, and the name that each is saved by."""
    mine: list[MetadataIndex]
    """What this rank writes."""
    metadata: Metadata
    """Of the whole checkpoint."""


@dataclasses.dataclass(frozen=True)
class _Task:
    """What this rank does for one checkpoint."""

    place: Place
    plan: _Plan
    parts: Mapping[MetadataIndex, Part]
    """What it writes."""
    frozen: set[MetadataIndex]
    """Which of them are not trained."""
    content: bytes
    """Of what is no tensor; rank 0's counts."""
    info: dict[str, Any]
    """For the manifest."""


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
        self._deleting: threading.Thread | None = None
        self._error: BaseException | None = None
        self._at_exit: Finalize | None = None
        self._lock = threading.Lock()
        self._afterwards: list[Callable[[], None]] | None = None

    def save(
        self,
        path: str | os.PathLike[str],
        nest: Mapping[str, Any],
        *,
        info: Mapping[str, Any] | None = None,
        background: bool = False,
    ) -> None:
        """Save a checkpoint directory. All ranks take part, and all of them raise if one does.

        Args:
            path: Of the directory, or its URL; on all ranks the same, and on all of them the same file system. What is
                there is replaced when the new one is complete.
            nest: Dictionaries and lists. What ranks have parts of is a ``Shard`` in each of theirs; all else is rank
                0's.
            info: What the manifest is to say about it; JSON.
            background: Return when a copy is made, and write while training goes on. See ``check`` and ``finish``.

        Raises:
            ValueError: If another run writes there, or what is there is no checkpoint.
            OSError: If any rank could not write. What was there before is still there.
            Exception: What an earlier save in the background has failed with.

        """
        task = self._begin(path, nest, info or {})
        with self._abandoning(task.place):
            if not background:
                self._write(self._gather, task)
                return
            beside = self._gather_beside()
            copied = self._on_all_ranks(lambda: host_copies(list(task.parts.items())))
        task = dataclasses.replace(task, parts=copied)

        def write() -> None:
            try:
                with self._abandoning(task.place):
                    self._write(beside, task)
                copied.clear()
                with self._lock:
                    afterwards, self._afterwards = self._afterwards or [], None
                for action in afterwards:
                    action()
            except BaseException as error:
                self._error = error

        self._afterwards = []
        self._at_exit = Finalize(None, self._report, exitpriority=-100)
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
        """Wait for a save in the background, and until what the last save has replaced is deleted.

        Raises:
            Exception: What it has failed with.

        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._deleting is not None:
            self._deleting.join()
            self._deleting = None
        if self._at_exit is not None:
            self._at_exit.cancel()
            self._at_exit = None
        self._afterwards = None  # if it has failed, what was there before stays
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _report(self) -> None:
        """At exit, if nobody has asked for what the last save in the background has failed with."""
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            traceback.print_exception(self._error)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(1)

    @property
    def is_saving(self) -> bool:
        """Whether a save in the background has not been waited for."""
        return self._thread is not None

    # ------------------------------------------------------------------- steps

    def _begin(self, path: str | os.PathLike[str], nest: Mapping[str, Any], info: Mapping[str, Any]) -> _Task:
        """Have all ranks agree on who writes what, and on a folder to write it to.

        Whatever one rank fails with, all of them raise: no rank is left waiting for the others.
        """
        run = this_run()
        place: Place | None = None

        def prepare() -> tuple[Mapping[Path, Shard], SavePlan, bytes, str]:
            nonlocal place
            self.finish()
            if not isinstance(nest, Mapping):
                raise TypeError(f"Expected a dictionary to save as a checkpoint, got a {type(nest).__name__}.")
            tensors, objects = take_tensors(dict(nest), keeps_whole=self._rank == 0)
            described, content = _describe(tensors, is_first=self._rank == 0), io.BytesIO()
            found = Place(path, self._run or run)
            if self._rank == 0:
                torch.save(objects, content)
                place = found
                place.begin()
            return tensors, described, content.getvalue(), str(found.final)

        with self._abandoning(lambda: place):
            error, prepared = _attempt(prepare)
            where = prepared[3] if prepared else ""
            same = prepared is not None and self._last is not None and self._last.described == prepared[1]
            answers = self._gather((_sendable(error), where, run, same))
            _raise_any([failed for failed, *_ in answers], error)
            assert prepared is not None
            tensors, described, content, _ = prepared
            if len({theirs for _, theirs, *_ in answers}) > 1:
                raise ValueError(
                    f"Expected the same path on all ranks, got {[theirs for _, theirs, *_ in answers]}. Make it of what"
                    " is the same on all of them (no local time, no random number), or broadcast it."
                )
            self._run = answers[0][2]
            place = Place(path, self._run)
            all_same = all(theirs for *_, theirs in answers)
            there = not place.final.is_local or place.temporary.exists()
            replies = self._gather((there, None if all_same else described))
            if blind := [rank for rank, (found, _) in enumerate(replies) if not found]:
                raise ValueError(
                    f"Expected {place.final} to be on a file system that all ranks share, but ranks {blind} do not see"
                    " what rank 0 has made there. Save to a shared folder, or whole checkpoints with"
                    " state_dict_type='full'."
                )
            if not all_same:
                self._last = _plan([theirs for _, theirs in replies], self._rank)
            assert self._last is not None
            parts = _parts(tensors)
            mine = {index: parts[index][0] for index in self._last.mine}
            frozen = {index for index in mine if parts[index][1]}
            return _Task(place, self._last, mine, frozen, content, self._info(info))

    @contextmanager
    def _abandoning(self, place: Place | Callable[[], Place | None]) -> Iterator[None]:
        """Have nothing left of a save that fails within it."""
        try:
            yield
        except BaseException:
            found = place() if callable(place) else place
            if self._rank == 0 and found is not None:
                found.abandon()
            raise

    def _on_all_ranks(self, do: Callable[[], T]) -> T:
        """Do something that may fail on some ranks; then all raise."""
        error, result = _attempt(do)
        _raise_any(self._gather(_sendable(error)), error)
        return result  # type: ignore[return-value]

    def _info(self, given: Mapping[str, Any]) -> dict[str, Any]:
        now = time.time()
        return {
            **given,
            "lightning_accel": importlib.metadata.version("lightning-accel"),
            "torch": torch.__version__,
            "created": datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="seconds"),
            "time": now,
            "run": self._run,
        }

    def _write(self, gather: Gather, task: _Task) -> None:
        place, folder = task.place, task.place.temporary
        kept: Kept | None = None

        def write() -> Written:
            nonlocal kept
            trained = {index: part for index, part in task.parts.items() if index not in task.frozen}
            written = write_file(folder, f"__{self._rank}_0.distcp", trained)
            still = {index: part for index, part in task.parts.items() if index in task.frozen}
            more, kept = write_frozen(folder, f"__{self._rank}_1.distcp", still, self._kept, place.final.path)
            return Written(written.places | more.places, written.files | more.files)

        error, written = _attempt(write)
        everyone = gather((written, _sendable(error)))
        _raise_failed([failed for _, failed in everyone], error, place)
        former: str | None = None
        if self._rank == 0:
            error, former = _attempt(lambda: self._complete(task, [done for done, _ in everyone]))
        answers = gather((_sendable(error), former))
        _raise_failed([failed for failed, _ in answers], error, place)
        self._kept = kept
        if (left := answers[0][1]) is not None:
            self._deleting = threading.Thread(target=self._delete, args=[Folder(left)], name="lightning_accel deletion")
            self._deleting.start()

    def _delete(self, former: Folder) -> None:
        """Delete what was replaced, which takes about as long as writing it: nobody waits but the next save."""
        former.remove_files(f"__{self._rank}_")
        if self._rank == 0:
            former.remove()

    def _complete(self, task: _Task, everyone: list[Written]) -> str | None:
        """Make a checkpoint of what all ranks have written. Returns the path of the one that it has replaced."""
        places: dict[MetadataIndex, Any] = {}
        files: dict[str, File] = {}
        for written in everyone:
            places |= written.places
            files |= written.files
        _alias(task.plan, places)
        metadata = dataclasses.replace(task.plan.metadata, storage_data=places)
        for name, body in ((METADATA_FILE, pickle.dumps(metadata)), (OBJECTS_FILE, task.content)):
            task.place.temporary.write(name, body)
            files[name] = File.of(body)
        former = task.place.complete(Manifest(files, {**task.info, "world_size": len(everyone)}))
        return None if former is None else former.path

    def _gather_beside(self) -> Gather:
        """Gather in the background. All ranks take part in the first call."""
        if self._beside is None:
            ranks = len(self._gather(None))
            if ranks == 1:
                self._beside = _alone
            else:
                group = dist.new_group(dist.get_process_group_ranks(self._group), backend=host_backend())

                def gather(value: Any) -> list[Any]:
                    found: list[Any] = [None] * ranks
                    dist.all_gather_object(found, value, group=group)
                    return found

                self._beside = gather
        return self._beside


def _describe(tensors: Mapping[Path, Shard], *, is_first: bool) -> SavePlan:
    """What this rank has. What is at several places has the name of the first of them in the plan."""
    paths: dict[str, Path] = {}
    canonical: dict[int, str] = {}
    state: dict[str, Shard] = {}
    aliases: dict[str, str] = {}
    for path, shard in tensors.items():
        name = _name(path)
        _require_one(name, path, paths.setdefault(name, path))
        first = canonical.setdefault(id(shard), name)
        if first == name:
            state[name] = shard
        else:
            aliases[name] = first
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, is_coordinator=is_first)
    return dataclasses.replace(planner.create_local_plan(), planner_data=(paths, aliases))


def _plan(everyone: list[SavePlan], rank: int) -> _Plan:
    """Who writes what: the same on all ranks, from what all of them have."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    plans, metadata = planner.create_global_plan(everyone)
    known = metadata.state_dict_metadata
    paths: dict[str, Path] = {}
    aliases: dict[str, str] = {}
    for plan in everyone:
        for alias, first in plan.planner_data[1].items():
            if first in known and alias not in known:
                known[alias] = known[first]
                aliases[alias] = first
    for plan in everyone:
        for name, path in plan.planner_data[0].items():
            if name in known:
                _require_one(name, path, paths.setdefault(name, path))
    metadata.planner_data = paths
    return _Plan(everyone[rank], aliases, [item.index for item in plans[rank].items], metadata)


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _require_one(name: str, path: Path, other: Path) -> None:
    if path != other:
        raise ValueError(
            f"Expected each tensor to have a name of its own, but those at {path} and {other} are both called"
            f" {name!r}. Rename one of them."
        )


def _attempt(do: Callable[[], T]) -> tuple[Exception | None, T | None]:
    """What something fails with, and what it returns."""
    try:
        return None, do()
    except Exception as error:
        return error, None


def _raise_any(everyone: list[Exception | None], own: Exception | None) -> None:
    """Raise this rank's error, or else another's."""
    for error in (own, *everyone):
        if error is not None:
            raise error


def _raise_failed(everyone: list[Exception | None], own: Exception | None, place: Place) -> None:
    """Raise on all ranks what the first of them could not write for."""
    failed = [(rank, error) for rank, error in enumerate(everyone) if error is not None]
    if not failed:
        return
    rank, error = failed[0]
    if isinstance(error, OSError):
        raise OSError(
            error.errno,
            f"Rank {rank} could not write the checkpoint {place.final}: {error.strerror or error}. What was there"
            f" before is still there. Free space on the disk of {place.final}, or save elsewhere",
        ) from own
    raise RuntimeError(f"Rank {rank} could not write the checkpoint {place.final}: {error!r}") from (own or error)


def _parts(tensors: Mapping[Path, Shard]) -> dict[MetadataIndex, tuple[Part, bool]]:
    """The parts that this rank has, by what torch.distributed.checkpoint calls them; and whether they are frozen."""
    found: dict[MetadataIndex, tuple[Part, bool]] = {}
    for path, shard in tensors.items():
        for box, values in shard.parts.values():
            found[MetadataIndex(_name(path), box.offsets)] = values, shard.frozen
    return found


def _alias(plan: _Plan, places: dict[MetadataIndex, Any]) -> None:
    """Have tensors of several names found under each of them."""
    for other, first in plan.aliases.items():
        kind = plan.metadata.state_dict_metadata[first]
        assert isinstance(kind, TensorStorageMetadata)
        for chunk in kind.chunks:
            places[MetadataIndex(other, chunk.offsets)] = places[MetadataIndex(first, chunk.offsets)]


def _sendable(error: BaseException | None) -> Exception | None:
    """An error that other ranks can read."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
