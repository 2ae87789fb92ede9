"""Writes this rank's files of a checkpoint directory."""

from __future__ import annotations

import functools
import hashlib
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.serialization import get_crc32_options, set_crc32_options

from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.manifest import File
from lightning_accel.core.checkpoint.shard import Part

_PIECE_BYTES = 2**20
"""So much is summed and then written while it is still in a processor's cache."""
_AHEAD_BYTES = 2**25
"""After so much the disk is told to begin."""
_SMALL_BYTES = 2**20
"""Up to here torch.save takes more time for what is around the values than for these."""


@dataclass
class Written:
    """What a rank has written."""

    places: dict[MetadataIndex, Any] = field(default_factory=dict)
    """Where each chunk is, as torch.distributed.checkpoint wants to know it."""
    files: dict[str, File] = field(default_factory=dict)
    """By name."""


@dataclass
class Kept:
    """What a rank has written last of tensors that are not trained. See ``write_frozen``."""

    digests: dict[MetadataIndex, bytes]
    written: Written
    path: str
    """Where the file is, once the checkpoint has its name."""
    file: tuple[int, ...]
    """Which file that is: another one may have got its name."""


class _Summing:
    """A stream that counts what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.begin()
        self.nbytes = 0
        self.error: OSError | None = None

    def begin(self) -> None:
        self.crc32, self.length = 0, 0

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        try:
            for start in range(0, view.nbytes, _PIECE_BYTES):
                piece = view[start : start + _PIECE_BYTES]
                self.crc32 = zlib.crc32(piece, self.crc32)
                self._stream.write(piece)
        except OSError as error:  # of which torch.save makes an error of its own
            self.error = error
            raise
        self.length += view.nbytes
        self.nbytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._stream.flush()


def write_file(folder: Folder, name: str, parts: Mapping[MetadataIndex, Part]) -> Written:
    """Write chunks to one file, one after the other.

    Args:
        folder: Where.
        name: Of the file.
        parts: The chunks' values; what they are on another device, or not end to end in memory, is copied one by one.

    """
    written = Written()
    if not parts:
        return written
    file = File(0)
    with folder.create(name) as stream, _one_checksum():
        summing, begun = _Summing(stream), 0
        for index, part in parts.items():
            offset = summing.nbytes
            summing.begin()
            try:
                _save(part if isinstance(part, Tensor) else part(), summing)
            except RuntimeError:
                if summing.error is not None:
                    raise summing.error from None
                raise
            file.chunks[offset] = summing.length, summing.crc32
            written.places[index] = _StorageInfo(name, offset, summing.length)
            if summing.nbytes - begun >= _AHEAD_BYTES:
                folder.begin_sync(stream, begun, summing.nbytes)
                begun = summing.nbytes
    file.nbytes = summing.nbytes
    written.files[name] = file
    return written


def _save(part: Tensor, stream: _Summing) -> None:
    """As torch.save, but quicker for small tensors."""
    if part.nbytes > _SMALL_BYTES:
        torch.save(_alone(part), stream)  # type: ignore[arg-type]
        return
    values = _on_host(part)
    before, after = _envelope(values.dtype, tuple(values.shape))
    stream.write(before)
    stream.write(values.reshape(-1).view(torch.uint8).numpy())
    stream.write(after)


@functools.lru_cache(maxsize=1024)
def _envelope(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the values of a tensor: without checksums it is the same for all values.

    Tensors of few shapes are what models and optimizers consist of, and each save has them again.
    """
    blank, saved = torch.zeros(shape, dtype=dtype), io.BytesIO()
    with _one_checksum():
        torch.save(blank, saved)
    content = saved.getvalue()
    reader: Any = torch.PyTorchFileReader(io.BytesIO(content))
    start: int = reader.get_record_offset("data/0")
    return content[:start], content[start + blank.nbytes :]


@contextmanager
def _one_checksum() -> Iterator[None]:
    """Within it, torch.save computes no CRC-32 of its own: torch.load looks at none, and the manifest has one."""
    former = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(former)


def write_frozen(
    folder: Folder, name: str, parts: Mapping[MetadataIndex, Part], kept: Kept | None, final: str
) -> tuple[Written, Kept | None]:
    """Write chunks of tensors that are not trained, or share the former checkpoint's file if they are what they were.

    The file is linked, so that either checkpoint may be deleted.

    Args:
        folder: Where.
        name: Of the file.
        parts: The chunks' values.
        kept: What this function returned last.
        final: The path of the checkpoint when it is complete.

    """
    if not parts:
        return Written(), None
    digests = {index: _digest(part) for index, part in parts.items()}
    if kept is not None and kept.digests == digests and folder.link(name, kept.path, kept.file):
        return kept.written, replace(kept, path=f"{final}/{name}")
    written = write_file(folder, name, parts)
    file = folder.identity(name)
    return written, None if file is None else Kept(digests, written, f"{final}/{name}", file)


def _digest(part: Part) -> bytes:
    values = _alone(part if isinstance(part, Tensor) else part())
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    if values.numel():
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _alone(part: Tensor) -> Tensor:
    """A chunk on the CPU whose memory holds its values end to end and nothing else.

    torch.save writes all of the memory behind a tensor, and our reader looks at nothing but that.
    """
    values = _on_host(part)
    storage = values.untyped_storage()
    if storage.nbytes() == values.nbytes:
        return values
    start = values.storage_offset() * values.element_size()
    inner = storage[start : start + values.nbytes]
    assert isinstance(inner, torch.UntypedStorage)
    return torch.empty(0, dtype=values.dtype).set_(inner, 0, values.shape, values.stride())


def _on_host(part: Tensor) -> Tensor:
    return part.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def host_copies(parts: Sequence[tuple[MetadataIndex, Part]]) -> dict[MetadataIndex, Part]:
    """Copies in host memory, pinned where they come from an accelerator."""
    copies: dict[MetadataIndex, Part] = {}
    devices = set()
    for index, part in parts:
        values = (part if isinstance(part, Tensor) else part()).detach()
        accelerated = values.device.type != "cpu"
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=accelerated)
        copies[index] = copy.copy_(values, non_blocking=accelerated)
        devices.add(values.device)
    for device in devices:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
    return copies
