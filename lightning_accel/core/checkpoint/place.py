"""The temporary folder that a checkpoint is written to, and how it gets its name: wholly or not at all.

[Note: leftovers]
A run that is killed while it saves leaves its temporary folder behind. Its name holds the run's signature, so whoever
saves there next knows whether that run is still alive: then two runs write to one place, which is an error; else the
folder is cleared away. Of a run on another machine it is not known; it counts as alive if the folder changes while it
is looked at. Runs of the same job that was requeued must not be kept from saving by what it has left elsewhere.

What is left of checkpoints with other names, which may never be saved again, is deleted as well if its run was on this
machine and has ended; of any other run it stays. So does what is complete, if that checkpoint is not there without it.
"""

from __future__ import annotations

import contextlib
import os
import re
import time

from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.manifest import MANIFEST_FILE, Manifest
from lightning_accel.core.checkpoint.metadata import METADATA_FILE
from lightning_accel.core.checkpoint.reader import OBJECTS_FILE
from lightning_accel.core.checkpoint.run import is_alive

_BEGAN = time.time()
_TEMPORARY = re.compile(r"\.(.+)\.([0-9a-f-]+)\.tmp(?:\.old)?")
"""Names of temporary folders: of which checkpoint, and whose."""
_WATCH_S = 10.0
"""For so long a folder is looked at that a run on another machine may be writing to."""


class Place:
    """Where a checkpoint is to be. Used by rank 0 alone, but for ``temporary``.

    Args:
        path: Of the checkpoint.
        run: Rank 0's ``this_run()``.

    """

    def __init__(self, path: str | os.PathLike[str], run: str) -> None:
        self.final = Folder(path)
        self.temporary = self.final.beside(f".{self.final.name}.{run}.tmp")  # as in _TEMPORARY
        """Where it is written."""
        self._run = run

    def begin(self) -> None:
        """Make the temporary folder, and clear away what runs that have died have left there.

        Raises:
            ValueError: If another run writes the same checkpoint, or what is there is no checkpoint.

        """
        for name in self.final.siblings():
            if found := _TEMPORARY.fullmatch(name):
                left, of, run = self.final.beside(name), found[1], found[2]
                if of == self.final.name:
                    self._clear(left, run)
                elif is_alive(run) is False:
                    _discard(left, self.final.beside(of))
        self._require_ours()
        require_replaceable(self.final)
        self.temporary.make()

    def _clear(self, left: Folder, run: str) -> None:
        """Delete what is left of a save, unless it is all that there is."""
        if run != self._run:
            alive = is_alive(run)
            if alive is None:
                alive = left.is_changing(_WATCH_S)
            if alive:
                raise self._not_alone(f"run {run} is writing to it as well")
        if left.size(MANIFEST_FILE) is not None and not self.final.exists():
            left.replace(self.final)  # killed when it was about to get its name: there is no other to delete
        else:
            left.remove()

    def _require_ours(self) -> None:
        if self.final.size(MANIFEST_FILE) is None:
            return
        try:
            info = Manifest.loads(self.final.read(MANIFEST_FILE), str(self.final)).info
        except ValueError:
            return  # it is damaged, and about to be replaced
        run, when = str(info.get("run")), info.get("time", 0.0)
        if run != self._run and when > _BEGAN and is_alive(run) is not False:
            raise self._not_alone(f"run {run} has done so since this one began ({info.get('created')})")

    def _not_alone(self, why: str) -> ValueError:
        return ValueError(
            f"Expected one run to write to {self.final}, but {why}. Give each run a folder of its own (dirpath of"
            " ModelCheckpoint, default_root_dir of the Trainer)."
        )

    def complete(self, manifest: Manifest) -> Folder | None:
        """All files are there: write the manifest, and let the checkpoint have its name.

        Returns:
            Where the one is now that had the name before. The caller deletes it.

        """
        self.temporary.write(MANIFEST_FILE, manifest.dumps())
        self.temporary.sync()
        return self.temporary.replace(self.final)

    def abandon(self) -> None:
        """Clear away what was written."""
        with contextlib.suppress(OSError):
            self.temporary.remove()


def require_replaceable(folder: Folder) -> None:
    """Raise if there is a folder of something else than a checkpoint: it would be deleted.

    Raises:
        ValueError: That.

    """
    found = folder.entries() if folder.is_folder() else []
    known = (MANIFEST_FILE, METADATA_FILE, OBJECTS_FILE)
    if any(name in known for name in found) or all(name.endswith(".distcp") for name in found):
        return
    raise ValueError(
        f"Expected {folder} to be a checkpoint, which is replaced, or nothing yet; it is a folder of something"
        f" else ({', '.join(found[:3])}{', …' if len(found) > 3 else ''}). Save elsewhere, or move it away."
    )


def _discard(left: Folder, final: Folder) -> None:
    """Delete what a run that has ended has left of a checkpoint, unless it is all that there is of it."""
    if left.size(MANIFEST_FILE) is None or final.exists():
        with contextlib.suppress(OSError):  # somebody else has, or may not: no reason not to save
            left.remove()
