"""Checkpoints: one format, whatever the row, the precision and the number of ranks.

A directory, which torch.distributed.checkpoint can read as well: tensors in chunks by name (``*.distcp``,
``.metadata``), everything else (``meta.pt``), and what belongs to it, with checksums, written last (``manifest.json``).
"""

import os
from collections.abc import Mapping
from typing import Any

from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.nest import put_tensors
from lightning_accel.core.checkpoint.reader import Reader, load_objects
from lightning_accel.core.checkpoint.saver import Saver
from lightning_accel.core.checkpoint.shard import Shard
from lightning_accel.core.checkpoint.stored import StoredTensor

__all__ = ["Reader", "Saver", "Shard", "StoredTensor", "is_directory", "load", "open_dcp", "save"]


def is_directory(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder: a checkpoint directory, or what is taken for one."""
    return not os.fspath(path).startswith(("http://", "https://")) and Folder(path).is_folder()


def save(path: str | os.PathLike[str], nest: Mapping[str, Any], *, info: dict[str, Any] | None = None) -> None:
    """Save a checkpoint directory from one process. It is complete, or what was there before is still there.

    Args:
        path: Of the directory, or its URL.
        nest: Dictionaries and lists of tensors, which may be ``StoredTensor`` of another checkpoint, and of what
            ``torch.load(weights_only=True)`` can read.
        info: What the manifest is to say about it; JSON.

    Raises:
        OSError: If it could not be written.
        ValueError: If another run writes there, or what is there is no checkpoint.

    """
    saver = Saver()
    saver.save(path, nest, info=info)
    saver.finish()


def load(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, Any]:
    """Open a checkpoint directory, whatever row and number of ranks it was saved with.

    Args:
        path: Of the directory, or its URL.
        weights_only: Refuse everything but tensors, numbers, strings and their collections.

    Returns:
        What was saved. Tensors are ``StoredTensor``: they are read when they are used.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is no whole checkpoint, or holds objects that are refused.

    """
    reader = Reader(path)
    nest: dict[str, Any] = put_tensors(reader.objects(weights_only=weights_only), reader.tensors())
    return nest


def open_dcp(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, Any]:
    """Open a directory that others have written with torch.distributed.checkpoint: as ``load``, without checksums."""
    reader = Reader(path, foreign=True)
    nest: dict[str, Any] = put_tensors({}, reader.tensors())
    others = {
        path: load_objects(content, str(reader.folder), weights_only=weights_only)
        for path, content in reader.others().items()
    }
    return _with_lists(put_tensors(nest, others))  # type: ignore[no-any-return]


def _with_lists(nest: Any) -> Any:
    """With lists where torch has found lists: it has their indices in paths, and strings for all keys."""
    if not isinstance(nest, dict):
        return nest
    inner = {key: _with_lists(value) for key, value in nest.items()}
    if inner and all(isinstance(key, int) for key in inner):
        return [value for _, value in sorted(inner.items())]
    return inner
