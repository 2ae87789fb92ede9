"""Checkpoint files: whole or not at all, read when needed, refused when damaged, and never executed."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import resource
import shutil
import signal
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import Tensor

from lightning_accel.core.checkpoint import Saver, load
from lightning_accel.plugins import AccelCheckpointIO
from lightning_accel.plugins.checkpoint_io import base_of, with_default

IO = AccelCheckpointIO()


def checkpoint(value: float = 1.0, size: int = 1000) -> dict[str, Any]:
    shared = torch.full((size,), value)
    return {
        "state_dict": OrderedDict(a=shared, tied=shared, b=torch.arange(7)),
        "epoch": 3,
        "nested": [{"x": torch.ones(3, dtype=torch.bfloat16)}, "text", None],
    }


def require_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert found["epoch"] == expected["epoch"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value)
    assert torch.equal(found["nested"][0]["x"], expected["nested"][0]["x"])
    assert found["nested"][1:] == expected["nested"][1:]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------- saving


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "one.ckpt"
    for value in (1.0, 2.0):  # the second one in place of the first
        IO.save_checkpoint(checkpoint(value), path)
        assert files(path.parent) == ["one.ckpt"]
        for found in (IO.load_checkpoint(path), torch.load(path), IO.load_checkpoint(f"file://{path}")):
            require_same(found, checkpoint(value))
    loaded = IO.load_checkpoint(path)["state_dict"]
    assert loaded["a"].data_ptr() == loaded["tied"].data_ptr()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, "others may read it as any other file"
    IO.remove_checkpoint(path)
    assert files(path.parent) == []


def test_saving_takes_no_copy_of_the_checkpoint(tmp_path: Path) -> None:
    large = checkpoint(size=4_000_000)
    tracemalloc.start()  # torch's tensors are not counted, the buffers that files are made in are
    IO.save_checkpoint(large, tmp_path / "large.ckpt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000 < os.path.getsize(tmp_path / "large.ckpt") / 15


def test_storage_options_are_refused_as_by_lightning(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        IO.save_checkpoint({}, tmp_path / "a.ckpt", storage_options={})


class Failing:
    """Cannot be saved."""

    def __reduce__(self) -> Any:
        raise LookupError("not this one")


def test_what_cannot_be_saved_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    IO.save_checkpoint(checkpoint(), path)
    with pytest.raises(LookupError, match="not this one"):
        IO.save_checkpoint({**checkpoint(2.0), "bad": Failing()}, path)
    assert files(tmp_path) == ["one.ckpt"]
    require_same(IO.load_checkpoint(path), checkpoint())


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Within it, the system refuses to make files larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_disk() -> Iterator[None]:
    """Within it, the disk turns out to be full at the very end, as file systems that allocate late have it."""
    with mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        yield


@pytest.mark.parametrize(
    "limit",
    [lambda: files_up_to(100), lambda: files_up_to(5_000), lambda: files_up_to(300_000), full_disk],
    ids=["nothing fits", "the head fits", "some fits", "full at the end"],
)
def test_a_disk_that_fills_up(tmp_path: Path, limit: Callable[[], Any]) -> None:
    path = tmp_path / "one.ckpt"
    IO.save_checkpoint(checkpoint(), path)
    with limit(), pytest.raises(OSError, match="The disk at") as caught:
        IO.save_checkpoint(checkpoint(2.0, size=100_000), path)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    message = str(caught.value)
    assert str(path) in message
    disk = next(folder for folder in path.parents if folder.is_mount())
    assert f"The disk at {disk} has" in message
    assert "what was there before is unchanged" in message
    assert "save_top_k" in message
    assert files(tmp_path) == ["one.ckpt"]
    require_same(IO.load_checkpoint(path), checkpoint())


def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not be written.*one\.ckpt"):
        IO.save_checkpoint(checkpoint(), tmp_path / "file" / "one.ckpt")


def test_a_folder_of_something_else_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"it is a folder of something else \(notes.txt\)"):
        IO.save_checkpoint({}, tmp_path)
    assert files(tmp_path) == ["notes.txt"]


def test_a_directory_that_is_a_checkpoint_is_replaced_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for value in (1, 3):
        Saver().save(path, {"value": value})
        assert load(path)["value"] == value
        IO.save_checkpoint({"value": value + 1}, path)
        assert torch.load(path, weights_only=True) == {"value": value + 1}
    assert files(tmp_path) == ["last.ckpt"]


class Pausing:
    """Tells that the file has been begun, and waits for ever."""

    def __init__(self, told: int) -> None:
        self.told = told

    def __reduce__(self) -> Any:
        os.write(self.told, b"begun")
        time.sleep(3600)
        raise AssertionError("it has to be killed")


def begin_to_save(path: Path) -> int:
    """A process that is in the middle of saving."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        try:
            IO.save_checkpoint({"a": torch.ones(10), "b": Pausing(write)}, path)
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 5) == b"begun"
    os.close(read)
    return process


def test_what_a_killed_process_leaves_is_removed_by_the_next_save(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    IO.save_checkpoint(checkpoint(), path)
    process = begin_to_save(path)
    try:
        assert len(files(tmp_path)) == 2
        IO.save_checkpoint(checkpoint(2.0), tmp_path / "other.ckpt")
        assert len(files(tmp_path)) == 3, "another process is still writing to it"
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    require_same(IO.load_checkpoint(path), checkpoint())
    IO.save_checkpoint(checkpoint(2.0), tmp_path / "other.ckpt")
    assert files(tmp_path) == ["one.ckpt", "other.ckpt"]


def test_file_systems_without_locks(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    left = tmp_path / ".0123456789abcdef.accel-tmp"
    left.write_bytes(b"who knows")
    with mock.patch.object(fcntl, "flock", side_effect=OSError(errno.ENOTSUP, "no locks")):
        IO.save_checkpoint(checkpoint(), path)
    assert files(tmp_path) == [left.name, "one.ckpt"], "nobody can know whether it is used"
    require_same(IO.load_checkpoint(path), checkpoint())


def test_two_processes_that_save_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    processes = []
    for value in (1.0, 2.0):
        process = os.fork()
        if not process:
            try:
                for _ in range(30):
                    IO.save_checkpoint(checkpoint(value), path)
                os._exit(0)
            finally:
                os._exit(1)
        processes.append(process)
    alive, seen = set(processes), 0
    while alive:
        if path.exists():
            IO.require_intact(path)
            value = float(IO.load_checkpoint(path)["state_dict"]["a"][0])
            assert value in (1.0, 2.0)
            seen += 1
        for process in list(alive):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                assert status == 0
                alive.remove(process)
    assert seen > 0
    assert files(tmp_path) == ["one.ckpt"]


# -------------------------------------------------------------------- loading


def mapped(path: Path) -> bool:
    """Whether this process has a file in its memory."""
    return str(path) in Path("/proc/self/maps").read_text()


def test_a_file_is_mapped_and_what_is_changed_stays_out_of_it(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    IO.save_checkpoint(checkpoint(), path)
    before = path.read_bytes()
    loaded = IO.load_checkpoint(path)
    assert mapped(path)
    loaded["state_dict"]["a"].fill_(7)
    assert path.read_bytes() == before
    IO.save_checkpoint(checkpoint(2.0), path)
    assert loaded["state_dict"]["b"].tolist() == list(range(7)), "the file that was replaced is still there for it"
    del loaded
    assert not mapped(path)


def test_old_versions_of_torch_and_files_without_checksums(tmp_path: Path) -> None:
    path = tmp_path / "legacy.ckpt"
    torch.save(checkpoint(), path, _use_new_zipfile_serialization=False)
    IO.require_intact(path)
    require_same(IO.load_checkpoint(path), checkpoint())
    assert torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    IO.require_intact(path)
    require_same(IO.load_checkpoint(path), checkpoint())


def test_each_flipped_bit_is_found_or_means_nothing(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    expected = {"a": torch.randn(50), "b": [torch.arange(20), "x" * 100]}
    IO.save_checkpoint(expected, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        content = sum(entry.file_size for entry in archive.infolist())
    found = 0
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        try:
            IO.require_intact(path)
            loaded = IO.load_checkpoint(path)
        except (ValueError, pickle.UnpicklingError):
            found += 1
        else:
            assert torch.equal(loaded["a"], expected["a"]), place
            assert torch.equal(loaded["b"][0], expected["b"][0]), place
            assert loaded["b"][1] == expected["b"][1], place
    assert content < found < len(whole), "between entries there is padding"


def test_a_flipped_byte_in_a_tensor_is_found_by_reading_all_of_it_only(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    IO.save_checkpoint(checkpoint(), path)
    whole = bytearray(path.read_bytes())
    place = whole.index(torch.ones(16).numpy().tobytes())
    whole[place] ^= 1
    path.write_bytes(whole)
    IO.require_intact(path, thoroughly=False)
    with pytest.raises(ValueError, match=rf"Expected {path} to be a checkpoint .* has changed since .*CRC-32"):
        IO.require_intact(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, share: float) -> None:
    path = tmp_path / "one.ckpt"
    IO.save_checkpoint(checkpoint(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"one\.ckpt to be a checkpoint .*, got a file that is none, is incomplete"):
        IO.load_checkpoint(path)


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("hello world\n" * 10),
        lambda path: path.write_bytes(bytes(range(256)) * 4),
        write_zip,
        lambda path: torch.save(torch.ones(3), path),
    ],
    ids=["text", "bytes", "zip", "a tensor"],
)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    path = tmp_path / "other"
    write(path)
    with pytest.raises(ValueError, match=f"Expected {path} to be a checkpoint"):
        IO.load_checkpoint(path)


@pytest.mark.parametrize("method", ["load_checkpoint", "require_intact"])
def test_a_missing_file_and_a_folder(tmp_path: Path, method: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*nowhere\.ckpt"):
        getattr(IO, method)(tmp_path / "nowhere.ckpt")
    with pytest.raises(ValueError, match=f"got the folder {tmp_path}, which is none"):
        getattr(IO, method)(tmp_path)


# --------------------------------------------------------------- safe loading


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
        lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    ],
    ids=["torch", "torch before 1.6", "pickle"],
)
def test_nothing_is_executed(tmp_path: Path, save: Callable[[Any, Path], Any]) -> None:
    path, made = tmp_path / "evil.ckpt", tmp_path / "made"
    save({"state_dict": {}, "x": Evil(made)}, path)
    for weights_only in (None, True):
        IO.require_intact(path)
        with pytest.raises(pickle.UnpicklingError, match=r"posix\.mkdir.*\. Nothing of it was executed") as caught:
            IO.load_checkpoint(path, weights_only=weights_only)
        assert "pass weights_only=False" in str(caught.value)
        assert str(path) in str(caught.value)
        assert not made.exists()
    if save is torch.save:
        IO.load_checkpoint(path, weights_only=False)  # whoever asks for it
        assert made.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_of_other_protocols_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"x": Evil(tmp_path / "made")}, protocol=4))
    with pytest.raises(ValueError, match="Unsupported operand"):
        IO.load_checkpoint(path)
    assert files(tmp_path) == ["evil.ckpt"]


def test_objects_are_loaded_for_those_who_trust_them(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    IO.save_checkpoint({"path": Path("a"), "a": torch.ones(3)}, path)
    with pytest.raises(pickle.UnpicklingError, match="pathlib"):
        IO.load_checkpoint(path)
    loaded = IO.load_checkpoint(path, weights_only=False)
    assert loaded["path"] == Path("a")
    assert loaded["a"].tolist() == [1, 1, 1]


# --------------------------------------------------------------- remote paths


def test_remote_paths(tmp_path: Path) -> None:
    path = "memory://accel/one.ckpt"
    IO.save_checkpoint(checkpoint(), path)
    IO.require_intact(path)
    require_same(IO.load_checkpoint(path), checkpoint())
    IO.save_checkpoint({"x": Evil(tmp_path / "made")}, path)
    with pytest.raises(pickle.UnpicklingError):
        IO.load_checkpoint(path)
    assert not (tmp_path / "made").exists()
    IO.remove_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        IO.load_checkpoint(path)


def test_what_comes_by_http_is_not_trusted_by_default(tmp_path: Path) -> None:
    with (
        mock.patch("torch.hub.load_state_dict_from_url", return_value={}) as load,
        mock.patch("lightning.fabric.plugins.io.torch_io.get_filesystem"),
    ):
        IO.load_checkpoint("https://example.org/one.ckpt")
        IO.load_checkpoint("https://example.org/one.ckpt", weights_only=False)
    assert [call.kwargs["weights_only"] for call in load.call_args_list] == [True, False]


# ---------------------------------------------------------------- other plugins


class Theirs(AccelCheckpointIO):
    pass


def test_the_users_own_stays_in_charge() -> None:
    assert type(with_default(None)) is AccelCheckpointIO
    theirs = Theirs()
    assert with_default(theirs) is theirs
    wrapped = AsyncCheckpointIO(theirs)
    assert with_default(wrapped) is wrapped
    assert base_of(wrapped) is theirs
    for wrapper in (AsyncCheckpointIO(), AsyncCheckpointIO(AsyncCheckpointIO())):
        assert base_of(wrapper) is None
        assert with_default(wrapper) is wrapper
        assert type(base_of(wrapper)) is AccelCheckpointIO
        first = base_of(wrapper)
        assert base_of(with_default(wrapper)) is first


def test_by_way_of_a_thread(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    io = with_default(AsyncCheckpointIO())
    io.save_checkpoint(checkpoint(), path)
    io.teardown()
    require_same(io.load_checkpoint(path), checkpoint())


def test_a_disk_is_named_where_it_is_mounted(tmp_path: Path) -> None:
    """The message is about the disk of the target, and not about that of the program."""
    usage = mock.Mock(free=1234567)
    with (
        full_disk(),
        mock.patch.object(shutil, "disk_usage", return_value=usage) as asked,
        mock.patch.object(Path, "is_mount", lambda self: self == tmp_path),
        pytest.raises(OSError, match=f"The disk at {tmp_path} has 1,234,567 bytes left"),
    ):
        IO.save_checkpoint({"a": Tensor(3)}, tmp_path / "one.ckpt")
    assert asked.call_args.args == (tmp_path,)
