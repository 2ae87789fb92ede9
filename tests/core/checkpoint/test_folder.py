"""Folders of any file system: names that are exchanged, and files that are shared."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lightning_accel.core.checkpoint import folder as module
from lightning_accel.core.checkpoint.folder import Folder


def no_exchange(one: str, other: str) -> bool:
    return False


@pytest.fixture(params=["exchange", "no renameat2", "no exchange", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder to make folders in, on a file system of each kind."""
    if request.param == "no renameat2":  # as the C libraries of other systems
        monkeypatch.setattr(module.ctypes, "CDLL", lambda *args, **kwargs: object())
    elif request.param == "no exchange":  # as NFS
        monkeypatch.setattr(module, "_exchange", no_exchange)
    if request.param == "memory":
        yield "memory://root"
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
    else:
        yield str(tmp_path)


def make(path: str, **files: bytes) -> Folder:
    folder = Folder(path)
    folder.make()
    for name, content in files.items():
        folder.write(name, content)
    return folder


def test_files(root: str) -> None:
    folder = Folder(f"{root}/a/b/")
    assert not folder.exists()
    assert (folder.size("x"), folder.entries(), folder.siblings()) == (None, [], [])
    folder.make()
    folder.write("x", b"content")
    folder.write(".hidden", b"")
    assert folder.exists()
    assert folder.is_folder()
    assert (folder.name, folder.siblings(), folder.entries()) == ("b", ["b"], [".hidden", "x"])
    assert (folder.size("x"), folder.read("x")) == (7, b"content")
    with folder.open("x") as stream:
        stream.seek(3)
        assert stream.read(2) == b"te"
    beside = folder.beside("c")
    assert str(beside) == f"{root}/a/c"
    folder.delete("x")
    assert folder.size("x") is None
    folder.remove()
    assert not folder.exists()
    folder.remove()  # it is gone already


def replace(folder: Folder, other: Folder) -> None:
    former = folder.replace(other)
    if former is not None:
        former.remove()


def test_replacing_nothing_a_folder_and_a_file(root: str) -> None:
    final = Folder(f"{root}/final")
    for content in (b"one", b"two", b"three"):
        replace(make(f"{root}/.new", **{"x": content, content.decode(): b""}), final)
        assert final.read("x") == content
        assert final.entries() == sorted(["x", content.decode()]), "nothing of the former one is left"
        assert final.siblings() == ["final"]
    final.remove()
    make(root, final=b"a checkpoint of one file")
    assert not final.is_folder()
    assert final.size("x") is None
    replace(make(f"{root}/.new", x=b"four"), final)
    assert final.read("x") == b"four"
    assert final.siblings() == ["final"]


def test_what_is_left_of_an_earlier_attempt_is_no_obstacle(root: str) -> None:
    final = make(f"{root}/final", x=b"one")
    make(f"{root}/.new.old", y=b"")
    make(f"{root}/.new", x=b"two").replace(final)
    assert final.read("x") == b"two"


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="names are exchanged on Linux only")
def test_there_is_no_moment_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = make(f"{tmp_path}/final", x=b"one")
    renamed = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *names: (renamed.append(names), rename(*names)))
    former = make(f"{tmp_path}/new", x=b"two").replace(final)
    assert not renamed, "the names are exchanged, in one step"
    assert final.read("x") == b"two"
    assert former is not None
    assert former.read("x") == b"one"


def test_if_the_name_cannot_be_taken_the_former_one_is_still_somewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where names cannot be exchanged there is a moment between two renames; nothing may be deleted before it."""
    monkeypatch.setattr(module, "_exchange", no_exchange)
    final, new = make(f"{tmp_path}/final", x=b"one"), make(f"{tmp_path}/new", x=b"two")
    rename = os.rename

    def interrupted(source: str, target: str) -> None:
        if target == final.path:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            new.replace(final)
    assert Folder(f"{tmp_path}/new.old").read("x") == b"one"
    assert new.read("x") == b"two"


def test_a_symbolic_link_is_replaced_and_not_what_it_points_to(tmp_path: Path) -> None:
    make(f"{tmp_path}/kept", x=b"one")
    (tmp_path / "final").symlink_to("kept", target_is_directory=True)
    make(f"{tmp_path}/new", x=b"two").replace(Folder(tmp_path / "final"))
    assert not (tmp_path / "final").is_symlink()
    assert (tmp_path / "final/x").read_bytes() == b"two"
    assert (tmp_path / "kept/x").read_bytes() == b"one"


def test_files_are_deleted_by_the_beginnings_of_their_names(tmp_path: Path) -> None:
    folder = make(f"{tmp_path}/it", __1_0=b"", __1_1=b"", __10_0=b"", other=b"")
    folder.remove_files("__1_")
    assert folder.entries() == ["__10_0", "other"]
    Folder(tmp_path / "nothing").remove_files("__1_")


def test_what_a_link_points_to_is_not_deleted_with_it(tmp_path: Path) -> None:
    make(f"{tmp_path}/kept", x=b"one")
    (tmp_path / "link").symlink_to("kept", target_is_directory=True)
    Folder(tmp_path / "link").remove_files("x")
    Folder(tmp_path / "link").remove()
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept/x").read_bytes() == b"one"


def test_files_are_linked_while_they_are_the_same(tmp_path: Path) -> None:
    source = make(f"{tmp_path}/a", x=b"content")
    identity = source.identity("x")
    assert identity is not None
    source.replace(Folder(tmp_path / "moved"))  # it stays the same file under another name
    target = make(f"{tmp_path}/b")
    assert target.link("x", f"{tmp_path}/moved/x", identity)
    assert (tmp_path / "b/x").stat().st_ino == (tmp_path / "moved/x").stat().st_ino
    assert not target.link("y", f"{tmp_path}/nothing/x", identity)
    (tmp_path / "moved/x").unlink()
    make(f"{tmp_path}/moved", x=b"content")  # the same name and size
    assert not target.link("z", f"{tmp_path}/moved/x", identity)
    assert target.entries() == ["x"]
    assert target.read("x") == b"content"


def test_a_remote_file_is_never_linked() -> None:
    folder = Folder("memory://somewhere")
    assert folder.identity("x") is None
    assert not folder.link("x", "/somewhere/y", (1, 2))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: None, False),
        (lambda folder: (folder / "x").write_bytes(b"more"), True),
        (lambda folder: (folder / "y").touch(), True),
    ],
)
def test_whether_a_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Any], expected: bool
) -> None:
    folder = make(str(tmp_path / "it"), x=b"1")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: change(tmp_path / "it"))
    assert folder.is_changing(0.05) == expected
    assert not Folder("memory://it").is_changing(0.05)


def test_file_urls_are_local(tmp_path: Path) -> None:
    folder = Folder(f"file://{tmp_path}/it")
    assert folder.is_local
    assert folder.path == f"{tmp_path}/it"
    make(folder.beside("new").url, x=b"").replace(folder)
    assert (tmp_path / "it/x").exists()


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("new", x=b"").replace(Folder("it"))
    assert (tmp_path / "it/x").exists()
    assert Folder("it").beside("other").path == f"{tmp_path}/other"
    assert Folder("it").siblings() == ["it"]
