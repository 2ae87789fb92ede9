"""What is written is there as a whole, or not at all; and nothing else is lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import trainer_checkpoint

from lightning_accel.convert import convert
from lightning_accel.convert.sizes import format_size, parse_size
from lightning_accel.core.checkpoint.folder import Folder


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    torch.save(trainer_checkpoint(), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


TARGETS: list[dict[str, Any]] = [
    {"dst": "out.ckpt"},
    {"dst": "out.safetensors"},
    {"dst": "out", "to": "safetensors", "max_shard_size": 400},
    {"dst": "out", "to": "sharded"},
]


@pytest.mark.parametrize("target", TARGETS)
def test_a_disk_that_fills_up_leaves_nothing(
    ckpt: Path, tmp_path: Path, target: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dst, options = tmp_path / target["dst"], {key: value for key, value in target.items() if key != "dst"}
    convert(ckpt, dst, **options)
    kept = contents(dst)
    real = os.fsync

    def full(handle: int) -> None:
        if os.path.isfile(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        convert(ckpt, dst, overwrite=True, **options)
    monkeypatch.undo()
    assert contents(dst) == kept
    assert {entry.name for entry in tmp_path.iterdir()} == {"last.ckpt", dst.name}
    convert(ckpt, dst, overwrite=True, **options)
    assert contents(dst).keys() == kept.keys()


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


def test_nothing_is_replaced_unless_asked(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "there.ckpt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"Expected nothing at .*there.ckpt, but it exists.*--overwrite"):
        convert(ckpt, tmp_path / "there.ckpt")
    assert (tmp_path / "there.ckpt").read_text() == "mine"


def test_a_folder_with_other_files_is_never_replaced(ckpt: Path, tmp_path: Path) -> None:
    convert(ckpt, tmp_path / "hf", to="safetensors")
    (tmp_path / "hf" / "config.json").write_text("{}")
    for to in ("safetensors", "sharded", "ckpt"):
        with pytest.raises(ValueError, match=r"other files in it, which would be lost \(config.json\)"):
            convert(ckpt, tmp_path / "hf", to=to, overwrite=True)
    assert (tmp_path / "hf" / "config.json").exists()


@pytest.mark.parametrize("dst", ["sharded", "sharded/inner.ckpt", "."])
def test_a_checkpoint_is_not_written_onto_its_source(ckpt: Path, tmp_path: Path, dst: str) -> None:
    convert(ckpt, tmp_path / "sharded", to="sharded")
    with pytest.raises(ValueError, match="another path than that of the source"):
        convert(tmp_path / "sharded", tmp_path / dst, to="ckpt", overwrite=True)


def test_a_link_to_the_source_is_the_source(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "link.ckpt").symlink_to(ckpt)
    with pytest.raises(ValueError, match="another path than that of the source"):
        convert(ckpt, tmp_path / "link.ckpt", overwrite=True)


def test_folders_on_the_way_are_made(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert("last.ckpt", "a/b/out.ckpt")
    convert("last.ckpt", "c/d/out", to="sharded")
    convert("last.ckpt", "e/f/out", to="safetensors")
    assert (tmp_path / "a" / "b" / "out.ckpt").is_file()
    assert Folder(tmp_path / "c" / "d" / "out").is_folder()
    assert (tmp_path / "e" / "f" / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("dst", "options", "message"),
    [
        ("out", {}, r"Expected out to end in \.bin.*or to be told what to write: to= \(--to\) ckpt, sharded"),
        ("out", {"to": "onnx"}, "got 'onnx'"),
        ("out.ckpt", {"max_shard_size": "1GB"}, "for a safetensors folder only, got it for out.ckpt"),
        ("out.safetensors", {"max_shard_size": "1GB"}, "for a safetensors folder only"),
        ("out", {"to": "safetensors", "max_shard_size": "big"}, "Expected a size such as '5GB'"),
    ],
)
def test_wrong_settings_are_explained(ckpt: Path, dst: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(ckpt, dst, **options)


def test_what_is_no_checkpoint_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found nothing"):
        convert(tmp_path / "missing", tmp_path / "out.ckpt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="It is a folder with notes.txt in it"):
        convert(tmp_path / "folder", tmp_path / "out.ckpt")


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 kb", "7", "2B", 3)] == [5 * 10**9, 1500, 7, 2, 3]
    for wrong in ("", "GB", "-1MB", "0", 0, "infGB", "1XB"):
        with pytest.raises(ValueError, match="Expected a size"):
            parse_size(wrong)
    assert [format_size(size) for size in (0, 999, 1000, 1_234_567, 5 * 10**15)] == [
        *("0 B", "999 B", "1.00 KB", "1.23 MB", "5000.00 TB")
    ]
