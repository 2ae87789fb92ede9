"""Reads a checkpoint directory: ours, with a manifest and checksums, or another of torch.distributed.checkpoint."""

from __future__ import annotations

import io
import os
import pickle
import re
import zlib
from collections.abc import Sequence
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from typing_extensions import override

from lightning_accel.core.checkpoint.boxes import Box
from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.manifest import MANIFEST_FILE, Manifest
from lightning_accel.core.checkpoint.metadata import METADATA_FILE, parse
from lightning_accel.core.checkpoint.stored import StoredTensor

OBJECTS_FILE = "meta.pt"
"""All that is no tensor, or a small one. Lightning's own name for it."""


class Reader:
    """An open checkpoint directory.

    Args:
        path: Of the directory, or its URL.
        foreign: Whether it was written by others: it needs no manifest, and has no checksums then.

    Raises:
        ValueError: If it is no checkpoint, or not whole: all that is missing or damaged is listed, but for tensors'
            checksums, which are compared when they are read.
        FileNotFoundError: If there is nothing.

    """

    manifest: Manifest | None
    """None of a directory that others have written."""
    metadata: Metadata

    def __init__(self, path: str | os.PathLike[str], *, foreign: bool = False) -> None:
        self.folder = Folder(path)
        if not self.folder.exists():
            raise FileNotFoundError(f"Expected a checkpoint at {self.folder}, found nothing.")
        if not self.folder.is_folder():
            raise ValueError(f"Expected {self.folder} to be a checkpoint directory, got a file.")
        self.manifest = self._checked_manifest(foreign)
        if self.folder.size(METADATA_FILE) is None:
            raise ValueError(
                f"Expected {self.folder} to be a checkpoint directory, which has the file {METADATA_FILE}; it has none."
            )
        self.metadata = parse(self.folder.read(METADATA_FILE), f"{self.folder}/{METADATA_FILE}")
        self._aliases: dict[tuple[Any, ...], StoredTensor] = {}
        self.bytes_read = 0
        """Of tensors."""

    def _checked_manifest(self, foreign: bool) -> Manifest | None:
        if self.folder.size(MANIFEST_FILE) is None:
            if foreign:
                return None
            hint = ""
            if self.folder.size(METADATA_FILE) is not None:
                hint = (
                    " It was not written by lightning_accel, or never completed. One of torch.distributed.checkpoint"
                    " or of another library can be converted: `accel convert`."
                )
            raise ValueError(
                f"Expected {self.folder} to be a complete checkpoint, which has the file {MANIFEST_FILE}, written last;"
                f" it has none.{hint}"
            )
        manifest = Manifest.loads(self.folder.read(MANIFEST_FILE), f"{self.folder}/{MANIFEST_FILE}")
        problems = []
        for name, file in manifest.files.items():
            size = self.folder.size(name)
            if size is None:
                problems.append(f"{name} is missing")
            elif size != file.nbytes:
                problems.append(f"{name} has {size} bytes, expected {file.nbytes}")
            elif file.crc32 is not None and zlib.crc32(self.folder.read(name)) != file.crc32:
                problems.append(f"{name} is damaged: its checksum is another one")
        if problems:
            raise ValueError(
                f"Expected {self.folder} to be as its manifest says, but it is damaged:\n  "
                + "\n  ".join(problems)
                + "\nUse another checkpoint."
            )
        return manifest

    # ------------------------------------------------------------------ tensors

    def tensors(self) -> dict[tuple[str | int, ...], StoredTensor]:
        """All tensors, by their path in nested dictionaries. What was tied is one object."""
        found: dict[tuple[str | int, ...], StoredTensor] = {}
        paths = self.metadata.planner_data or {}
        for key, kind in self.metadata.state_dict_metadata.items():
            if not isinstance(kind, TensorStorageMetadata):
                continue
            tensor = StoredTensor(self, key, kind.size, kind.properties.dtype)
            place = tuple((info.relative_path, info.offset) for info in self._infos(key))
            found[tuple(paths.get(key, (key,)))] = self._aliases.setdefault(place, tensor) if place else tensor
        return found

    def others(self) -> dict[tuple[str | int, ...], bytes]:
        """What is no tensor in a directory that others have written: the bytes of ``torch.save``, by path."""
        paths = self.metadata.planner_data or {}
        found = {}
        for key, kind in self.metadata.state_dict_metadata.items():
            if isinstance(kind, BytesStorageMetadata):
                info = self._place(MetadataIndex(key))
                found[tuple(paths.get(key, (key,)))] = bytes(self._read(info.relative_path, info.offset, info.length))
        return found

    def boxes(self, key: str) -> list[Box]:
        """The boxes that a tensor is stored as."""
        chunks = self._tensor(key).chunks
        return [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]

    def fill(self, key: str, targets: Sequence[tuple[Box, Tensor]]) -> None:
        """Read parts of a tensor; see ``StoredTensor.fill``."""
        for box in self.boxes(key):
            wanted = [(common, outer, target) for outer, target in targets if (common := box.common(outer)) is not None]
            if not wanted:
                continue
            values = self._chunk(key, box)
            for common, outer, target in wanted:
                common.of(target, outer).copy_(common.of(values, box))

    def _chunk(self, key: str, box: Box) -> Tensor:
        info = self._info(key, box)
        content = self._read(info.relative_path, info.offset, info.length)
        try:
            if self.manifest is not None:
                return _values(content, self._tensor(key).properties.dtype, box)
            values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # any error at all can come of bytes that are something else
            raise ValueError(
                f"Expected {self.folder}/{info.relative_path} to hold {key!r} at byte {info.offset}, but it could not"
                f" be read: {error}"
            ) from error
        if not isinstance(values, Tensor) or tuple(values.shape) != box.sizes:
            raise ValueError(f"Expected {key!r} in {self.folder} to have a part of shape {box.sizes}, got another.")
        return values

    def _read(self, name: str, offset: int, length: int) -> bytearray:
        content = bytearray(length)
        stream: Any
        with self.folder.open(name) as stream:
            stream.seek(offset)
            rest = memoryview(content)
            while rest:  # unbuffered reads may be short
                read = stream.readinto(rest)
                if not read:
                    raise ValueError(f"Expected {self.folder}/{name} to have {offset + length} bytes, but it ended.")
                rest = rest[read:]
        self.bytes_read += length
        if self.manifest is not None:
            expected = self.manifest.files[name].chunks.get(offset)
            if expected is None or expected != (length, zlib.crc32(content)):
                raise ValueError(
                    f"Expected {length} bytes at byte {offset} of {self.folder}/{name} to have the checksum that the"
                    " manifest says, but they are damaged. Use another checkpoint."
                )
        return content

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found = self.metadata.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def _info(self, key: str, box: Box) -> Any:
        return self._place(MetadataIndex(key, box.offsets))

    def _place(self, index: MetadataIndex) -> Any:
        try:
            return self.metadata.storage_data[index]
        except KeyError as error:
            raise ValueError(
                f"Expected {self.folder}/{METADATA_FILE} to say where each part of each tensor is, but it does not for"
                f" {index}."
            ) from error

    def _infos(self, key: str) -> list[Any]:
        return [self._info(key, box) for box in self.boxes(key)]

    # ------------------------------------------------------------------- others

    def objects(self, *, weights_only: bool = True) -> dict[str, Any]:
        """What is no tensor, or a small one.

        Args:
            weights_only: Refuse anything but tensors, numbers, strings and their collections.

        Raises:
            ValueError: If there is something else.

        """
        if self.folder.size(OBJECTS_FILE) is None:
            return {}
        where = f"{self.folder}/{OBJECTS_FILE}"
        found = load_objects(self.folder.read(OBJECTS_FILE), where, weights_only=weights_only)
        assert isinstance(found, dict)
        return found


def load_objects(content: bytes, where: str, *, weights_only: bool) -> Any:
    """What ``torch.save`` has made of objects.

    Args:
        content: The bytes.
        where: The file's name, for messages.
        weights_only: Refuse anything but tensors, numbers, strings and their collections.

    Raises:
        ValueError: If there is something else.

    """
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = found.group(1) if found else str(error)
        raise ValueError(
            f"Expected {where} to hold tensors, numbers, strings and collections of them only, but it asks for {what}."
            " Nothing of it was run. If you trust where it comes from, load it with weights_only=False, or allow that"
            " class by torch.serialization.add_safe_globals([...])."
        ) from error
    except Exception as error:  # any error at all can come of bytes that are something else
        if not weights_only:
            raise
        raise ValueError(f"Expected {where} to hold what torch.save has written, but it could not be read.") from error


def _values(content: bytearray, dtype: torch.dtype, box: Box) -> Tensor:
    """The values of a chunk that this package has written, which are end to end: where they lie, not a copy of them."""
    if box.numel == 0:
        return torch.empty(box.sizes, dtype=dtype)
    # torch.load would copy them, so that there would be two of the chunk in memory at a time.
    archive: Any = torch._C.PyTorchFileReader(cast("IO[bytes]", _Window(content)))
    start = archive.get_record_offset("data/0")
    return torch.frombuffer(content, dtype=dtype, count=box.numel, offset=start).reshape(box.sizes)


class _Window(io.RawIOBase):
    """A stream of bytes that are there already."""

    def __init__(self, content: bytearray) -> None:
        self._content = memoryview(content)
        self._position = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        piece = self._content[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._content)}[whence]
        return self._position

    @override
    def tell(self) -> int:
        return self._position
