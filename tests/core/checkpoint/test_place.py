"""How a checkpoint gets its name, what dead runs leave behind, and two runs that write to one place."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_accel.core.checkpoint import folder, load, place, save
from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.manifest import MANIFEST_FILE, File, Manifest
from lightning_accel.core.checkpoint.place import Place
from lightning_accel.core.checkpoint.run import _signature, this_run

ELSEWHERE = "ffffffff-123-456"
"""A run on another machine."""


@pytest.fixture
def alive() -> Iterator[str]:
    """Another run, which is alive."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield _signature(process.pid)
        process.communicate(b"\n")


@pytest.fixture
def dead() -> str:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        run = _signature(process.pid)
        process.communicate(b"\n")
    return run


def leave(path: Path, run: str, number: int, *, complete: bool = False, suffix: str = "tmp") -> Path:
    """What a run leaves that is killed while it saves: a file, and all the rest if it was about to rename it."""
    left = Folder(path.parent / f".{path.name}.{run}.{suffix}")
    left.make()
    left.write("number", b"%d" % number)
    if complete:
        left.write(MANIFEST_FILE, Manifest({"number": File.of(b"%d" % number)}, {}).dumps())
    return Path(left.path)


def write(path: Path | str, number: int = 7) -> None:
    made = Place(path, this_run())
    made.begin()
    made.temporary.write("number", b"%d" % number)
    former = made.complete(Manifest({"number": File.of(b"%d" % number)}, {"run": this_run(), "time": time.time()}))
    if former is not None:
        former.remove()


def number(path: Path | str) -> int:
    return int(Folder(path).read("number"))


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize("url", ["{}", "file://{}", "memory://{}"])
def test_a_checkpoint_gets_its_name_when_it_is_complete(url: str, tmp_path: Path) -> None:
    path = url.format(tmp_path / "deep/it")
    first = Place(path, this_run())
    first.begin()
    first.temporary.write("number", b"1")
    assert not first.final.exists()
    first.complete(Manifest({}, {}))
    assert number(path) == 1
    write(path, 2)
    assert number(path) == 2
    assert Folder(path).siblings() == ["it"]


def test_an_abandoned_one_leaves_nothing_and_the_former_one_stays(tmp_path: Path) -> None:
    write(tmp_path / "it", 1)
    second = Place(tmp_path / "it", this_run())
    second.begin()
    second.temporary.write("number", b"2")
    second.abandon()
    assert number(tmp_path / "it") == 1
    assert names(tmp_path) == ["it"]


# ---------------------------------------------------------------------------- leftovers


@pytest.mark.parametrize("suffix", ["tmp", "tmp.old"])
@pytest.mark.parametrize("whose", ["dead", "own"])
def test_what_dead_runs_have_left_is_cleared_away(dead: str, whose: str, suffix: str, tmp_path: Path) -> None:
    write(tmp_path / "it", 1)
    leave(tmp_path / "it", dead if whose == "dead" else this_run(), 2, suffix=suffix)
    write(tmp_path / "it", 3)
    assert number(tmp_path / "it") == 3
    assert names(tmp_path) == ["it"]


@pytest.mark.parametrize("suffix", ["tmp", "tmp.old"])
def test_what_dead_runs_have_left_of_other_checkpoints_is_cleared_away(dead: str, suffix: str, tmp_path: Path) -> None:
    for name in ("it.also", "other", "it.also.it", "step=1.ckpt"):
        leave(tmp_path / name, dead, 2, suffix=suffix)
    leave(tmp_path / "kept", dead, 2, complete=True, suffix=suffix)
    write(tmp_path / "kept", 1)  # it is there without that
    leave(tmp_path / "kept", dead, 2, complete=True, suffix=suffix)
    write(tmp_path / "it")
    assert names(tmp_path) == ["it", "kept"]
    assert number(tmp_path / "kept") == 1


def test_what_may_be_needed_of_other_checkpoints_stays(alive: str, dead: str, tmp_path: Path) -> None:
    kept = [leave(tmp_path / "other", run, 2).name for run in (alive, this_run(), ELSEWHERE)]
    kept.append(leave(tmp_path / "all_there_is", dead, 2, complete=True).name)
    for name in (".it.notes.tmp", f"it.{dead}.tmp", f".it.{dead}.tmp.new", f".{dead}.tmp", ".other.abc.tmp"):
        (tmp_path / name).mkdir()
        kept.append(name)
    write(tmp_path / "it")
    assert names(tmp_path) == sorted([*kept, "it"])


def test_what_cannot_be_cleared_away_is_no_reason_not_to_save(
    dead: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left = leave(tmp_path / "other", dead, 2)

    def refuse(self: Folder) -> None:
        raise PermissionError("it is another user's")

    monkeypatch.setattr(Folder, "remove", refuse)
    write(tmp_path / "it")
    assert names(tmp_path) == sorted([left.name, "it"])


@pytest.mark.parametrize("suffixes", [["tmp"], ["tmp.old"], ["tmp", "tmp.old"]])
def test_what_was_complete_when_a_run_was_killed_is_not_lost(dead: str, suffixes: list[str], tmp_path: Path) -> None:
    """Where names cannot be exchanged, it may be killed between two renames: the newer one is taken."""
    for age, suffix in enumerate(suffixes):
        leave(tmp_path / "it", dead, 5 - age, complete=True, suffix=suffix)
    Place(tmp_path / "it", this_run()).begin()
    assert number(tmp_path / "it") == 5
    assert names(tmp_path) == [f".it.{this_run()}.tmp", "it"]


def test_a_run_on_another_machine_is_alive_if_its_folder_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left = leave(tmp_path / "it", ELSEWHERE, 2)
    monkeypatch.setattr(place, "_WATCH_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(folder.time, "sleep", lambda seconds: (left / "number").write_text("22"))
        with pytest.raises(ValueError, match=f"run {ELSEWHERE} is writing to it as well"):
            write(tmp_path / "it", 3)
    assert names(tmp_path) == [left.name]
    write(tmp_path / "it", 3)  # nothing happens any more
    assert names(tmp_path) == ["it"]


# ------------------------------------------------------------------------------ two runs


def test_two_runs_that_write_at_once(alive: str, tmp_path: Path) -> None:
    write(tmp_path / "it", 1)
    left = leave(tmp_path / "it", alive, 2)
    with pytest.raises(ValueError, match=f"Expected one run to write to {tmp_path}/it, but run {alive}.*dirpath"):
        write(tmp_path / "it", 3)
    assert number(tmp_path / "it") == 1
    assert number(left) == 2
    assert names(tmp_path) == [left.name, "it"]


@pytest.mark.parametrize(("who", "when", "refused"), [("dead", 1, False), ("alive", -1e6, False), ("alive", 1, True)])
def test_two_runs_that_write_by_turns(
    alive: str, dead: str, who: str, when: float, refused: bool, tmp_path: Path
) -> None:
    """That another run has written there before is how runs are continued; that it does so still is a mistake."""
    write(tmp_path / "it", 1)
    run = {"alive": alive, "dead": dead}[who]
    info = {"run": run, "time": time.time() + when}
    (tmp_path / "it" / MANIFEST_FILE).write_bytes(Manifest({}, info).dumps())
    if refused:
        with pytest.raises(ValueError, match=f"run {run} has done so since this one began"):
            write(tmp_path / "it", 2)
    else:
        write(tmp_path / "it", 2)
    assert number(tmp_path / "it") == (1 if refused else 2)
    assert names(tmp_path) == ["it"]


SAVE = """
import sys
sys.modules["lightning"] = None  # takes seconds to import, and the core does without
from lightning_accel.core.checkpoint import save
save(sys.argv[1], {"number": int(sys.argv[2])})
print("saved", flush=True)
input()
"""


def test_two_processes(tmp_path: Path) -> None:
    save(tmp_path / "it", {"number": 1})
    command = [sys.executable, "-c", SAVE, str(tmp_path / "it"), "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # It began after the first save: to it, that run has simply come before.
        assert process.stdout.readline() == b"saved\n"
        with pytest.raises(ValueError, match="Expected one run to write to"):
            save(tmp_path / "it", {"number": 3})
        process.communicate(b"\n")
    assert load(tmp_path / "it")["number"] == 2
    save(tmp_path / "it", {"number": 3})
    assert load(tmp_path / "it")["number"] == 3


# ------------------------------------------------------------------- what is there already


@pytest.mark.parametrize(
    "prepare",
    [
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b"a checkpoint of one file"),
        lambda path: write(path, 1),
        lambda path: (write(path, 1), (path / MANIFEST_FILE).write_bytes(b"damaged")),
        lambda path: (path.mkdir(), (path / ".metadata").touch(), (path / "__0_0.distcp").touch()),
        lambda path: (path.mkdir(), (path / "__1_0.distcp").touch()),
        lambda path: (path.mkdir(), (path / "meta.pt").touch()),
    ],
    ids=["empty", "file", "ours", "damaged", "dcp", "partly deleted", "almost deleted"],
)
def test_what_may_be_replaced(prepare: Callable[[Path], Any], tmp_path: Path) -> None:
    prepare(tmp_path / "it")
    write(tmp_path / "it", 2)
    assert number(tmp_path / "it") == 2
    assert names(tmp_path) == ["it"]


def test_a_folder_of_something_else_is_not_deleted(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / "project" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"project to be a checkpoint.*folder of something else \(a, b, c, …\)"):
        save(tmp_path / "project", {"a": 1})
    assert names(tmp_path) == ["project"]
    assert names(tmp_path / "project") == ["a", "b", "c", "d"]
