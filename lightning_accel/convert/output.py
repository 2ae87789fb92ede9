"""Writes files and folders so that they are there as a whole, or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.manifest import MANIFEST_FILE

_REPLACEABLE = (".safetensors", ".safetensors.index.json")


def check_destination(src: Path, dst: Path, *, overwrite: bool) -> None:
    """Refuse to write where something would be lost.

    Args:
        src: What is read.
        dst: What is to be written.
        overwrite: Whether a checkpoint that is there may be replaced.

    Raises:
        ValueError: If one is the other or within it, or if there is something else than a checkpoint.
        FileExistsError: If there is something, and it is not to be replaced.

    """
    source, final = src.resolve(), dst.resolve()
    if final == source or source in final.parents or final in source.parents:
        raise ValueError(f"Expected another path than that of the source, {src}, or one within it, got {dst}.")
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise FileExistsError(
            f"Expected nothing at {dst}, but it exists. Replace it with overwrite=True (--overwrite)."
        )
    if not dst.is_dir() or (dst / MANIFEST_FILE).is_file():
        return
    if others := sorted(entry.name for entry in dst.iterdir() if not entry.name.endswith(_REPLACEABLE)):
        raise ValueError(
            f"Expected {dst} to be a checkpoint that can be replaced, but it is a folder with other files in it, which"
            f" would be lost ({', '.join(others[:5])}{', …' if len(others) > 5 else ''}). Choose another path, or"
            " remove it yourself."
        )


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when this is left without an error, and has reached the disk then."""
    with _temporary(path) as temporary:
        parent = Folder(path.absolute().parent)
        parent.make()
        with parent.create(temporary.name) as stream:
            yield stream


@contextmanager
def new_folder(path: Path) -> Iterator[Folder]:
    """A folder that gets its name when this is left without an error, and has reached the disk then."""
    with _temporary(path) as temporary:
        temporary.make()
        yield temporary
        temporary.sync()


@contextmanager
def _temporary(path: Path) -> Iterator[Folder]:
    """What is to be at ``path``, under another name."""
    final = Folder(path.absolute())
    temporary = final.beside(f".{final.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        temporary.replace(final)
    except BaseException:
        temporary.remove()
        raise
