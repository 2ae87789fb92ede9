"""The manifest: what it says comes back, and no damage to it goes unnoticed."""

from __future__ import annotations

import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_accel.core.checkpoint import manifest as module
from lightning_accel.core.checkpoint.manifest import File, Manifest

SMALL = Manifest(
    {"__0_0.distcp": File(10, chunks={0: (4, 1), 4: (6, 2)}), "meta.pt": File.of(b"abc")},
    {"world_size": 2, "step": 3, "name": "ä\n"},
)


def test_what_is_written_is_read() -> None:
    assert Manifest.loads(SMALL.dumps(), "here") == SMALL
    assert Manifest.loads(Manifest({}, {}).dumps(), "here") == Manifest({}, {})
    assert json.loads(SMALL.dumps())["manifest"]["info"]["step"] == 3, "it is JSON for everybody else"


@given(st.integers(0, len(SMALL.dumps()) - 1), st.integers(0, 7))
def test_any_flipped_bit_is_noticed(position: int, bit: int) -> None:
    content = bytearray(SMALL.dumps())
    content[position] ^= 1 << bit
    with pytest.raises(ValueError, match="Expected here to be the manifest of a checkpoint.*damaged"):
        Manifest.loads(bytes(content), "here")


@given(st.integers(0, len(SMALL.dumps()) - 1))
def test_any_truncation_is_noticed(size: int) -> None:
    with pytest.raises(ValueError, match="damaged"):
        Manifest.loads(SMALL.dumps()[:size], "here")


@pytest.mark.parametrize("content", [b"", b"\n\n\n", b"{}", b"[1]\n[2]\n}\n", bytes(range(256)), SMALL.dumps() * 2])
def test_something_else_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="damaged"):
        Manifest.loads(content, "here")


@pytest.mark.parametrize(("name", "value"), [("VERSION", module.VERSION + 1), ("FORMAT", "another")])
def test_another_format_or_a_newer_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, name, value)
        content = SMALL.dumps()
    with pytest.raises(ValueError, match=rf"version 1 or less, got .*{value}.*Update lightning_accel"):
        Manifest.loads(content, "here")


def test_a_file_knows_its_checksum() -> None:
    assert File.of(b"abc") == File(3, zlib.crc32(b"abc"), {})
