"""Checkpoints that are one file: written as a whole or not at all, and never executed.

[Note: how a file is replaced]
It is written beside its place under another name, and gets its own by a rename when all of it is on the disk. Until
then what was there before stays as it is, whatever happens: a full disk, an exception, a loss of power. The temporary
file is locked as long as it is written to. So whoever saves into the same folder can tell what a process that was
killed has left there, and removes it.

[Note: mapped files]
Loading maps a file into memory instead of reading it: a tensor is read when it is used, and each rank uses what it
needs. So nothing is said about whether the rest is what was written. torch's files are zip archives with a checksum for
each entry, at which ``torch.load`` does not look; ``require_intact`` does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pickle
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, get_filesystem
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_accel.core.checkpoint import StoredTensor
from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.place import require_replaceable
from lightning_accel.core.checkpoint.streamed_save import can_be_streamed, streamed_save

_SUFFIX = ".accel-tmp"
_CHUNK_BYTES = 2**20
_ARCHIVE = b"PK\x03\x04"
"""What a zip archive begins with."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AccelCheckpointIO(TorchCheckpointIO):
    """Reads and writes checkpoint files; what the strategies of this package use by default.

    Local files are written as a whole or not at all, without a second copy of their content in memory. Loading maps
    them into memory, and admits nothing but tensors, numbers, strings and containers of these, unless it is told to
    trust the file by ``weights_only=False``. For remote paths it is Lightning's ``TorchCheckpointIO``, with the same
    default of ``weights_only``.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint. See [Note: how a file is replaced].

        Args:
            checkpoint: What ``torch.save`` can save. Of tensors that are a ``StoredTensor`` one at a time is in memory.
            path: Where to. Missing folders are made.
            storage_options: Refused, as by Lightning.

        Raises:
            TypeError: If there are storage options.
            ValueError: If the path is a folder of something else than a checkpoint.
            OSError: If it cannot be written; what was there before still is. Says of a full disk which one it is.

        """
        target = local_path(path)
        if target is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        require_replaceable(Folder(target))  # a directory that another strategy has saved
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _replacing(target) as file:
                stream = _Stream(file)
                try:
                    _save(checkpoint, cast("BinaryIO", stream))
                except Exception:
                    if stream.failure is not None:  # torch makes another error of it
                        raise stream.failure from None
                    raise

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint. See [Note: mapped files].

        Args:
            path: The file.
            map_location: As for ``torch.load``.
            weights_only: False to trust the file: it may then hold any objects, and execute any code. Else only what is
                registered with torch as safe is admitted.

        Returns:
            The checkpoint. Tensors on the CPU may be parts of the file that are read when they are used first, and
            change in memory only.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no checkpoint, or damaged.
            pickle.UnpicklingError: If it holds anything that may not be safe. Nothing of it is executed.

        """
        file = local_path(path)
        if file is None:
            if weights_only is None and str(path).startswith("http"):
                weights_only = True  # Lightning's default is to trust what comes from there
            return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)
        self.require_intact(file, thoroughly=False)
        is_archive = _is_archive(file)
        try:
            loaded = torch.load(file, map_location=map_location, weights_only=weights_only, mmap=is_archive)
        except pickle.UnpicklingError as error:
            refused = None if weights_only is False else _refused(file, error, is_archive)
            if refused is None:
                raise _damaged(file, _reason(error)) from error
            raise pickle.UnpicklingError(
                f"Expected {file} to hold nothing but tensors, numbers, strings and containers of them, got {refused}."
                " Nothing of it was executed. If you trust whoever has written the file, pass weights_only=False to"
                " what loads it (trainer.fit, trainer.test, ..., fabric.load), or admit single classes by"
                " torch.serialization.add_safe_globals([...])."
            ) from error
        except RuntimeError as error:
            raise _damaged(file, _reason(error)) from error
        except Exception as error:
            if is_archive:  # of a class that it holds, say
                raise
            raise _damaged(file, _reason(error)) from error
        if not isinstance(loaded, dict):
            raise ValueError(f"Expected {file} to be a checkpoint, that is a dict, got a {type(loaded).__name__}.")
        return loaded

    def require_intact(self, path: Any, *, thoroughly: bool = True) -> None:
        """Raise unless a local checkpoint file is as it was written.

        What is known of remote files, and of those of old versions of torch, is that loading them succeeds.

        Args:
            path: The file.
            thoroughly: Read all of it and compare checksums, and not just look for its end.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a file, has no end, or something in it has changed.

        """
        file = local_path(path)
        if file is None or not _is_archive(file):
            return
        try:
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist() if thoroughly else ():
                    if entry.CRC == 0 and entry.file_size:
                        continue  # torch was told to write none
                    with archive.open(entry) as content:
                        while content.read(_CHUNK_BYTES):
                            pass
        except Exception as error:  # where a number of the archive has changed it may be anything
            raise _damaged(file, _reason(error)) from error


def base_of(io: CheckpointIO | None) -> CheckpointIO | None:
    """What does the work for a CheckpointIO that wraps others; None if it was not told yet."""
    while isinstance(io, _WrappingCheckpointIO):
        io = io.checkpoint_io
    return io


def with_default(io: CheckpointIO | None) -> CheckpointIO:
    """A strategy's CheckpointIO: the user's, or that of this package, also within one that wraps others."""
    if io is None:
        return AccelCheckpointIO()
    inner = io
    while isinstance(inner, _WrappingCheckpointIO) and inner.checkpoint_io is not None:
        inner = inner.checkpoint_io
    if isinstance(inner, _WrappingCheckpointIO):
        inner.checkpoint_io = AccelCheckpointIO()
    return io


def local_path(path: Any) -> Path | None:
    """The path of a local file or folder; None of any other."""
    if not _is_local_file_protocol(path):
        return None
    return Path(get_filesystem(path)._strip_protocol(str(path)))


def _is_archive(file: Path) -> bool:
    """Whether a file is a zip archive, as torch has them since version 1.6."""
    if file.is_dir():
        raise ValueError(
            f"Expected a checkpoint, got the folder {file}, which is none. Pass the path of a file, or of a folder that"
            " was saved as a checkpoint."
        )
    try:
        with open(file, "rb") as content:
            return content.read(len(_ARCHIVE)) == _ARCHIVE
    except FileNotFoundError:
        raise FileNotFoundError(f"Checkpoint file not found: {file}. All ranks look for it under this path.") from None


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(
        f"Expected {file} to be a checkpoint that was written by torch.save, got a file that is none, is incomplete or"
        f" has changed since ({why}). Take an earlier checkpoint, or copy it anew from where it comes from."
    )


def _reason(error: Exception) -> str:
    """What torch says, without what it advises."""
    found = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))
    return found[1] if found else next(iter(str(error).splitlines()), "") or repr(error)


def _refused(file: Path, error: Exception, is_archive: bool) -> str | None:
    """What safe loading did not admit; None if that is not why it failed."""
    if is_archive:
        with contextlib.suppress(Exception):  # it executes nothing, either, but may fail where loading did
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            return "objects of " + ", ".join(names) if names else _reason(error)
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"an object of {found[1]}" if found else None


class _Stream:
    """A file for ``torch.save``, which remembers what the disk has said."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save(checkpoint: dict[str, Any], stream: BinaryIO) -> None:
    tensors = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor)]
    stored = any(isinstance(tensor, StoredTensor) for tensor in tensors)
    if stored and all(can_be_streamed(tensor) for tensor in tensors):
        streamed_save(checkpoint, stream, lambda nbytes: None)
    else:
        torch.save(checkpoint, stream)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``target`` at the end. See [Note: how a file is replaced]."""
    _remove_leftovers(target.parent)
    temporary, file = _create(target.parent)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if target.is_dir():  # while it is locked
                former = Folder(temporary).replace(Folder(target))
                assert former is not None
                former.remove()
            else:
                os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not all file systems can do it
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _create(folder: Path) -> tuple[Path, BinaryIO]:
    """A new temporary file in a folder, locked."""
    while True:
        path = folder / f".{secrets.token_hex(8)}{_SUFFIX}"
        file = path.open("xb")
        with contextlib.suppress(OSError):  # not all file systems know locks; there leftovers stay
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # somebody took it for a leftover before it was locked


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f".*{_SUFFIX}"):
        # Whoever writes to it has it locked.
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Say of errors of the file system which checkpoint and which disk they are about."""
    try:
        yield
    except OSError as error:
        what = f"{error.strerror or error}: the checkpoint could not be written; what was there before is unchanged."
        if error.errno in _FULL:
            disk = next(folder for folder in target.absolute().parents if folder.is_mount())
            with contextlib.suppress(OSError):
                what += f" The disk at {disk} has {shutil.disk_usage(disk).free:,} bytes left."
            what += (
                " Free some space there, keep fewer checkpoints (ModelCheckpoint(save_top_k=...)), or save elsewhere"
                " (ModelCheckpoint(dirpath=...), Trainer(default_root_dir=...))."
            )
        raise OSError(error.errno, what, str(target)) from error
