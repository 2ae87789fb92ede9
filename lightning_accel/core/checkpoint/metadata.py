"""Reads the metadata of torch.distributed.checkpoint directories, which are pickles, without running what they say."""

from __future__ import annotations

import io
import pickle
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata
from typing_extensions import override

METADATA_FILE = ".metadata"
"""torch's name for it."""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): PurePosixPath,  # where it was written to; nothing looks at it
    ("pathlib", "WindowsPath"): PureWindowsPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("pathlib._local", "WindowsPath"): PureWindowsPath,
} | {
    (module.__name__, name): getattr(module, name)
    for module, names in (
        (
            metadata,
            (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            ),
        ),
        (filesystem, ("_StorageInfo",)),
    )
    for name in names
}


class _Refused(Exception):
    """Something that does not describe tensors is asked for."""


class _Unpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        """Only what describes tensors."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _Refused(f"{module}.{name}")


def parse(content: bytes, where: str) -> Metadata:
    """The metadata of a checkpoint from the bytes of its ``.metadata`` file.

    Args:
        content: The bytes.
        where: The file's name, for messages.

    Raises:
        ValueError: If they are something else, or want something run.

    """
    try:
        found = _Unpickler(io.BytesIO(content)).load()
    except _Refused as error:
        raise ValueError(
            f"Expected {where} to describe tensors, as torch.distributed.checkpoint does, but it asks for"
            f" {error}. Nothing of it was run. Do not use a checkpoint from a source that you do not trust."
        ) from error
    except Exception as error:  # any error at all can come of bytes that are no pickle
        raise ValueError(f"Expected {where} to be metadata of torch.distributed.checkpoint, got {error!r}.") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"Expected {where} to hold metadata of a checkpoint, got a {type(found).__name__}.")
    return found
