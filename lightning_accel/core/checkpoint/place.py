"""The temporary folder that a checkpoint is written to, and how it gets its name: wholly or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid

from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.manifest import MANIFEST_FILE, Manifest

RUN = uuid.uuid4().hex[:12]
"""This process, which may be one of several that train together: rank 0's stands for all of them."""
_BEGAN = time.time()
_WRITER_FILE = "writer.json"
_ABANDONED_S = 900.0
"""After so long without a change, what a process of another machine was writing counts as abandoned."""


class Place:
    """Where a checkpoint is to be. Used by rank 0 alone, but for ``temporary``.

    Args:
        path: Of the checkpoint.
        run: Rank 0's ``RUN``.

    """

    def __init__(self, path: str | os.PathLike[str], run: str) -> None:
        self.final = Folder(path)
        self.temporary = self.final.beside(f".{self.final.name}.{run}.tmp")
        """Where it is written."""

    def begin(self) -> None:
        """Make the temporary folder, and clear away what runs that have died have left there.

        Raises:
            ValueError: If another run writes the same checkpoint.

        """
        self._require_ours()
        prefix, own = f".{self.final.name}.", self.temporary.name
        for name in self.final.siblings():
            if not (name.startswith(prefix) and name.endswith((".tmp", ".tmp.old"))):
                continue
            other = self.final.beside(name)
            if name != own and (who := _alive(other)):
                raise ValueError(
                    f"Expected one run to write to {self.final}, but {who} is writing to it as well. Give each run a"
                    " folder of its own (dirpath of ModelCheckpoint, default_root_dir of the Trainer)."
                )
            other.remove()
        self.temporary.make()
        writer = {"host": socket.gethostname(), "pid": os.getpid()}
        self.temporary.write(_WRITER_FILE, json.dumps(writer).encode())

    def _require_ours(self) -> None:
        if self.final.size(MANIFEST_FILE) is None:
            return
        try:
            info = Manifest.loads(self.final.read(MANIFEST_FILE), str(self.final)).info
        except ValueError:
            return  # it is damaged, and about to be replaced
        if info.get("run") != RUN and info.get("time", 0.0) > _BEGAN:
            raise ValueError(
                f"Expected one run to write to {self.final}, but another one has done so since this one began"
                f" ({info.get('created')}). Give each run a folder of its own."
            )

    def complete(self, manifest: Manifest) -> None:
        """All files are there: write the manifest, and let the checkpoint have its name."""
        self._drop_writer()
        self.temporary.write(MANIFEST_FILE, manifest.dumps())
        self.temporary.sync()
        self.temporary.replace(self.final)

    def abandon(self) -> None:
        """Clear away what was written."""
        with contextlib.suppress(OSError):
            self.temporary.remove()

    def _drop_writer(self) -> None:
        with contextlib.suppress(OSError):
            self.temporary.delete(_WRITER_FILE)


def _alive(folder: Folder) -> str | None:
    """Who is writing to a temporary folder; None if nobody is any more."""
    try:
        writer = json.loads(folder.read(_WRITER_FILE))
        host, pid = writer["host"], int(writer["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None if folder.age() > _ABANDONED_S / 60 else "another process"
    if host != socket.gethostname():
        return None if folder.age() > _ABANDONED_S else f"process {pid} on {host}"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return f"process {pid} on this machine"
