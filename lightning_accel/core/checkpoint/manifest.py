"""The manifest: what belongs to a checkpoint directory, how large it is, and its checksums. It is written last.

A directory without a valid one is not a checkpoint (yet), whatever else is in it. Tensors lie in chunks, each of which
has a CRC-32 of its own, so that a reader checks just what it reads.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

MANIFEST_FILE = "manifest.json"
FORMAT = "lightning_accel checkpoint"
VERSION = 1


@dataclass
class File:
    """One file of a checkpoint."""

    nbytes: int
    crc32: int | None = None
    """Of the whole file; None if it consists of chunks."""
    chunks: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By the offset of each chunk: its length in bytes, and its CRC-32."""

    @classmethod
    def of(cls, content: bytes) -> File:
        """A file with this content."""
        return cls(len(content), zlib.crc32(content))


@dataclass
class Manifest:
    """What a checkpoint directory consists of."""

    files: dict[str, File]
    """By name."""
    info: dict[str, Any]
    """Who wrote it: versions, number of ranks, row, time, …; JSON."""

    def dumps(self) -> bytes:
        """As the content of a file, which starts with a checksum of the rest."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "info": self.info,
            "files": {
                name: {**asdict(file), "chunks": [[at, *chunk] for at, chunk in sorted(file.chunks.items())]}
                for name, file in sorted(self.files.items())
            },
        }
        return _framed(json.dumps(content).encode())

    @classmethod
    def loads(cls, content: bytes, where: str) -> Manifest:
        """From the content of a file.

        Args:
            content: The bytes.
            where: The file's name, for messages.

        Raises:
            ValueError: If it is damaged, or of another format or version.

        """
        lines = content.split(b"\n")
        if len(lines) != 4 or content != _framed(lines[1]):
            raise ValueError(
                f"Expected {where} to be the manifest of a checkpoint, with the checksum that it says, but it is"
                " damaged. Use another checkpoint."
            )
        found = json.loads(lines[1])
        if found["format"] != FORMAT or found["version"] > VERSION:
            raise ValueError(
                f"Expected {where} to be of format {FORMAT!r}, version {VERSION} or less, got {found['format']!r},"
                f" version {found['version']}. Update lightning_accel."
            )
        files = {
            name: File(file["nbytes"], file["crc32"], {at: (length, crc) for at, length, crc in file["chunks"]})
            for name, file in found["files"].items()
        }
        return cls(files, found["info"])


def _framed(body: bytes) -> bytes:
    return b'{"crc32": %d, "manifest":\n%s\n}\n' % (zlib.crc32(body), body)
