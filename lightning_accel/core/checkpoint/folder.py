"""A folder on any file system that fsspec knows: what checkpoints are read from and written to."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_POLL_S = 0.2
_RANGE_WRITE = 2
_sync_file_range: Any = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None


class Folder:
    """A path, and what can be done with it.

    Args:
        path: Of a local folder, or a URL.

    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.url = os.fspath(path).rstrip("/")
        fs, self.path = url_to_fs(self.url)
        self._fs: Any = fs
        self.is_local = isinstance(fs, LocalFileSystem)
        self._fs.invalidate_cache()  # other ranks may have written since it was last looked at

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self.path).rstrip("/").rsplit("/", 1)[-1]

    def beside(self, name: str) -> Folder:
        """Another entry of the folder that this one is in."""
        head, slash, _ = self.url.rpartition("/")
        return Folder(f"{head}{slash}{name}")

    def siblings(self) -> list[str]:
        """The names of the entries of the folder that this one is in, sorted."""
        return self._entries(self.path.rpartition("/")[0] or "/")

    def entries(self) -> list[str]:
        """The names of what is in it, sorted."""
        return self._entries(self.path)

    def _entries(self, path: str) -> list[str]:
        if not self._fs.isdir(path):
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in self._fs.ls(path, detail=False))

    # ----------------------------------------------------------------- reading

    def exists(self) -> bool:
        """Whether there is anything."""
        return bool(self._fs.exists(self.path))

    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return bool(self._fs.isdir(self.path))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        try:
            return int(self._fs.size(self._file(name)))
        except (FileNotFoundError, NotADirectoryError):  # a checkpoint of one file may have this name
            return None

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return bytes(self._fs.cat_file(self._file(name)))

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file, to be read."""
        if self.is_local:
            return open(self._file(name), "rb", buffering=0)
        return self._fs.open(self._file(name), "rb")  # type: ignore[no-any-return]

    def _file(self, name: str) -> str:
        return f"{self.path}/{name}"

    # ----------------------------------------------------------------- writing

    def make(self) -> None:
        """Create it, with all folders it is in."""
        self._fs.makedirs(self.path, exist_ok=True)

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A new file, which has reached the disk when this is left."""
        with self._fs.open(self._file(name), "wb") as stream:
            yield stream
            if self.is_local:
                stream.flush()
                os.fsync(stream.fileno())

    def begin_sync(self, stream: IO[bytes], start: int, stop: int) -> None:
        """Have the kernel begin to bring a range of an open file to the disk, and not wait. A hint: Linux takes it.

        The disk then works while the next range is made ready, and little is left for the end.
        """
        if self.is_local and _sync_file_range is not None:
            stream.flush()
            _sync_file_range(stream.fileno(), ctypes.c_int64(start), ctypes.c_int64(stop - start), _RANGE_WRITE)

    def write(self, name: str, content: bytes) -> None:
        """Create a file that reaches the disk."""
        with self.create(name) as stream:
            stream.write(content)

    def link(self, name: str, source: str, identity: tuple[int, ...]) -> bool:
        """Have a local file of another folder here as well, if it still is the one that ``identity`` has told.

        Returns:
            Whether that was possible.

        """
        if not self.is_local:
            return False
        try:
            os.link(source, self._file(name))
        except OSError:
            return False
        if self.identity(name) == identity:
            return True
        self.delete(name)
        return False

    def identity(self, name: str) -> tuple[int, ...] | None:
        """What a local file keeps, whatever it is called, until it is written to; None of one that is not local."""
        if not self.is_local:
            return None
        found = os.stat(self._file(name))
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def sync(self) -> None:
        """Have the names of its files reach the disk."""
        if self.is_local:
            _sync(self.path)

    def is_changing(self, seconds: float) -> bool:
        """Whether anything in a local folder changes within some seconds. Others have nothing until it is complete."""
        if not self.is_local:
            return False
        before, end = self._state(), time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_POLL_S)
            if self._state() != before:
                return True
        return False

    def _state(self) -> list[tuple[str, int, int]] | None:
        try:
            found = [(entry.name, entry.stat()) for entry in os.scandir(self.path)]
        except OSError:
            return None  # it is gone, or just going
        return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)

    def delete(self, name: str) -> None:
        """Delete a file."""
        self._fs.rm_file(self._file(name))

    def remove(self) -> None:
        """Delete it with all that is in it."""
        if self.is_local:
            if os.path.isdir(self.path) and not os.path.islink(self.path):
                shutil.rmtree(self.path, ignore_errors=True)
            else:
                Path(self.path).unlink(missing_ok=True)
        elif self._fs.exists(self.path):
            self._fs.rm(self.path, recursive=True)

    def replace(self, other: Folder) -> Folder | None:
        """Rename this to ``other``, instead of what is there.

        On local file systems of Linux there is no moment without one of the two. Elsewhere the former one has the name
        of this one with ``.old`` at its end. Object stores cannot rename: there it is deleted first.

        Returns:
            Where the former one is now. The caller deletes it.

        """
        if not self.is_local:
            other.remove()
            self._fs.mv(self.path, other.path, recursive=True)
            return None
        former: Folder | None = None
        if not os.path.lexists(other.path):
            os.rename(self.path, other.path)
        elif _exchange(self.path, other.path):
            former = self
        else:
            former = Folder(f"{self.url}.old")
            former.remove()
            os.rename(other.path, former.path)
            os.rename(self.path, other.path)
        _sync(os.path.dirname(other.path))
        return former

    def remove_files(self, prefix: str) -> None:
        """Delete the local files in it whose names begin so; what a link to a folder points to stays."""
        if not self.is_local or os.path.islink(self.path):
            return
        with contextlib.suppress(OSError):  # somebody else deletes all of it
            for name in os.listdir(self.path):
                if name.startswith(prefix):
                    os.unlink(self._file(name))


def _sync(path: str) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _exchange(one: str, other: str) -> bool:
    """Exchange two names at once; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
