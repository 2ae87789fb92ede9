"""Directories that are not whole, or no checkpoints: all that is wrong is said, and nothing is run."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from lightning_accel.core.checkpoint import Reader, StoredTensor, is_directory, load, open_dcp, save
from lightning_accel.core.checkpoint.manifest import MANIFEST_FILE, File, Manifest
from lightning_accel.core.checkpoint.metadata import METADATA_FILE
from lightning_accel.core.checkpoint.reader import OBJECTS_FILE

DATA_FILE = "__0_0.distcp"
NEST: dict[str, Any] = {
    "state_dict": {"w": torch.randn(300, 100), "b": torch.randn(50_000), "s": torch.tensor(2.0)},
    "numbers": [1, 2.5, "text", None, (3, {"x": True})],
    "list": [torch.arange(20_000), torch.ones(2)],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "it", NEST)
    return tmp_path / "it"


def read_all(folder: Path) -> None:
    """Use everything that is in a checkpoint."""

    def use(value: Any) -> None:
        if isinstance(value, Tensor):
            value.sum()
        elif isinstance(value, dict):
            for entry in value.values():
                use(entry)

    found = load(folder)
    use(found)
    use(dict(enumerate(found["list"])))


def reseal(folder: Path) -> None:
    """Have the manifest agree with small files that were changed: what somebody who means harm does."""
    path = folder / MANIFEST_FILE
    manifest = Manifest.loads(path.read_bytes(), "")
    for name in (METADATA_FILE, OBJECTS_FILE):
        manifest.files[name] = File.of((folder / name).read_bytes())
    path.write_bytes(manifest.dumps())


def test_what_is_saved_is_loaded(folder: Path) -> None:
    found = load(folder)
    assert found["numbers"] == NEST["numbers"]
    for name, value in NEST["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value)
    assert isinstance(found["list"], list)
    assert all(torch.equal(a, b) for a, b in zip(found["list"], NEST["list"], strict=True))
    assert isinstance(found["state_dict"]["w"], StoredTensor)
    assert {entry.name for entry in folder.iterdir()} == {DATA_FILE, METADATA_FILE, OBJECTS_FILE, MANIFEST_FILE}


def test_a_chunk_is_in_memory_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Reader(folder).tensors()["state_dict", "b"]

    def copy(*_: Any, **__: Any) -> Any:
        raise AssertionError("torch.load copies the bytes that were read")

    monkeypatch.setattr(torch, "load", copy)
    assert torch.equal(stored.full(), NEST["state_dict"]["b"])


def test_what_is_one_tensor_is_one_tensor_again(tmp_path: Path) -> None:
    w = torch.randn(300, 100)
    save(tmp_path / "it", {"a": {"w": w, "v": w[:200]}, "b": [w], "c": w.view(-1)})
    found = load(tmp_path / "it")
    assert found["a"]["w"] is found["b"][0]
    assert torch.equal(found["a"]["v"], w[:200])
    assert torch.equal(found["c"], w.view(-1))
    assert (tmp_path / "it" / DATA_FILE).stat().st_size < (30_000 * 2 + 20_000) * 4 + 3 * 4096


# ------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [DATA_FILE, METADATA_FILE, OBJECTS_FILE, MANIFEST_FILE])
def test_a_flipped_byte_anywhere_is_an_error_that_names_the_file(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    rng = random.Random(0)
    # The first and the last ones, and others: headers, values, the checksums of torch's own zip files.
    for position in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"(?s){name}.*damaged"):
            read_all(folder)
    (folder / name).write_bytes(whole)
    read_all(folder)


@pytest.mark.parametrize("name", [DATA_FILE, METADATA_FILE, OBJECTS_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("size", [0, 1, -1])
def test_a_truncated_file(folder: Path, name: str, size: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    with pytest.raises(ValueError, match=f"(?s){name}"):
        Reader(folder)


def test_everything_that_is_missing_or_damaged_is_listed(folder: Path) -> None:
    (folder / DATA_FILE).unlink()
    (folder / OBJECTS_FILE).write_bytes((folder / OBJECTS_FILE).read_bytes() + b"more")
    content = bytearray((folder / METADATA_FILE).read_bytes())
    content[100] ^= 1
    (folder / METADATA_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as caught:
        Reader(folder)
    assert f"{DATA_FILE} is missing" in str(caught.value)
    assert f"{OBJECTS_FILE} has " in str(caught.value)
    assert f"{METADATA_FILE} is damaged" in str(caught.value)


def test_a_file_that_is_truncated_while_it_is_open(folder: Path) -> None:
    stored = load(folder)["state_dict"]["b"]
    (folder / DATA_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{DATA_FILE} to have .* bytes, but it ended"):
        stored.full()


def test_only_what_is_read_is_checked(folder: Path) -> None:
    reader = Reader(folder)
    (info,) = (info for index, info in reader.metadata.storage_data.items() if index.fqn == "state_dict.b")
    content = bytearray((folder / DATA_FILE).read_bytes())
    content[info.offset + info.length // 2] ^= 4
    (folder / DATA_FILE).write_bytes(content)
    state = load(folder)["state_dict"]
    assert torch.equal(state["w"], NEST["state_dict"]["w"])
    with pytest.raises(ValueError, match="damaged"):
        state["b"].full()


def test_no_manifest(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=f"has the file {MANIFEST_FILE}, written last; it has none.*accel convert"):
        Reader(folder)


def test_no_metadata(folder: Path) -> None:
    manifest = Manifest.loads((folder / MANIFEST_FILE).read_bytes(), "")
    del manifest.files[METADATA_FILE]
    (folder / MANIFEST_FILE).write_bytes(manifest.dumps())
    (folder / METADATA_FILE).unlink()
    with pytest.raises(ValueError, match=f"has the file {METADATA_FILE}; it has none"):
        Reader(folder)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nothing, found nothing"):
        Reader(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{tmp_path}/file to be a checkpoint directory, got a file"):
        Reader(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/empty to be a complete checkpoint"):
        Reader(tmp_path / "empty")
    with pytest.raises(ValueError, match=f"{tmp_path}/empty .*it has none"):
        open_dcp(tmp_path / "empty")
    assert not is_directory(tmp_path / "nothing")
    assert not is_directory(tmp_path / "file")
    assert is_directory(tmp_path / "empty"), "so that it is opened as one, which says what is missing"


def test_a_checkpoint_that_was_moved_or_copied(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    read_all(tmp_path / "copy")


# ---------------------------------------------------------------------- meaning harm


class Touch:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def in_metadata(folder: Path, made: Path) -> None:
    (folder / METADATA_FILE).write_bytes(pickle.dumps(Metadata({}, planner_data=Touch(made))))


def in_objects(folder: Path, made: Path) -> None:
    torch.save({"a": Touch(made)}, folder / OBJECTS_FILE)


def in_objects_as_a_bare_pickle(folder: Path, made: Path) -> None:
    (folder / OBJECTS_FILE).write_bytes(pickle.dumps(Touch(made)))


@pytest.mark.parametrize("hide", [in_metadata, in_objects, in_objects_as_a_bare_pickle])
def test_nothing_is_run(folder: Path, hide: Callable[[Path, Path], None], tmp_path: Path) -> None:
    hide(folder, tmp_path / "made")
    reseal(folder)
    with pytest.raises(ValueError, match=r"(posix|nt)\.mkdir.*Nothing of it was run|Nothing of it was run"):
        load(folder)
    assert not (tmp_path / "made").exists()


def test_nothing_is_run_in_place_of_a_tensor(folder: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Touch(tmp_path / "made"), buffer)
    reader = Reader(folder)
    (info,) = (info for index, info in reader.metadata.storage_data.items() if index.fqn == "state_dict.b")
    body = buffer.getvalue().ljust(info.length, b"\0")
    content = bytearray((folder / DATA_FILE).read_bytes())
    content[info.offset : info.offset + info.length] = body
    (folder / DATA_FILE).write_bytes(content)
    manifest = Manifest.loads((folder / MANIFEST_FILE).read_bytes(), "")
    manifest.files[DATA_FILE].chunks[info.offset] = info.length, zlib.crc32(body)
    (folder / MANIFEST_FILE).write_bytes(manifest.dumps())
    with pytest.raises(ValueError, match="hold 'state_dict.b'.* but it could not be read"):
        load(folder)["state_dict"]["b"].full()
    assert not (tmp_path / "made").exists()


class Own:
    """What a user may want to save."""

    def __init__(self, number: int) -> None:
        self.number = number


def test_users_objects_are_opt_in(tmp_path: Path) -> None:
    save(tmp_path / "it", {"own": Own(7)})
    with pytest.raises(ValueError, match=r"asks for .*Own\. Nothing of it was run.*weights_only=False"):
        load(tmp_path / "it")
    assert load(tmp_path / "it", weights_only=False)["own"].number == 7
    with torch.serialization.safe_globals([Own]):
        assert load(tmp_path / "it")["own"].number == 7


# ------------------------------------------------------------ directories of others


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    state = {"model": {"w": torch.randn(30, 4)}, "step": 7, "own": "text"}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    return tmp_path / "dcp"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_directories_of_others_are_opened_as_such_only(foreign: Path) -> None:
    found = open_dcp(foreign)
    assert found["model"]["w"].shape == (30, 4)
    assert (found["step"], found["own"]) == (7, "text")
    with pytest.raises(ValueError, match="accel convert"):
        load(foreign)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("seed", range(5))
def test_damage_in_directories_of_others_is_an_error_of_reading(foreign: Path, seed: int) -> None:
    """They have no checksums of ours, but whatever is wrong with a file is a ValueError that names it."""
    path = foreign / DATA_FILE
    path.write_bytes(random.Random(seed).randbytes(path.stat().st_size))
    with pytest.raises(ValueError, match=str(foreign)):
        open_dcp(foreign)
    reader = Reader(foreign, foreign=True)
    with pytest.raises(ValueError, match=DATA_FILE):
        reader.tensors()["model", "w"].full()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{DATA_FILE} to have .* bytes, but it ended"):
        open_dcp(foreign)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_that_knows_of_no_place(foreign: Path) -> None:
    metadata = pickle.loads((foreign / METADATA_FILE).read_bytes())
    metadata.storage_data = {}
    (foreign / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=rf"{METADATA_FILE} to say where .*model\.w"):
        open_dcp(foreign)


def test_chunks_are_files_that_torch_can_read(folder: Path) -> None:
    reader = Reader(folder)
    content = (folder / DATA_FILE).read_bytes()
    for index, info in reader.metadata.storage_data.items():
        body = io.BytesIO(content[info.offset : info.offset + info.length])
        assert isinstance(torch.load(body, weights_only=True), Tensor), index
