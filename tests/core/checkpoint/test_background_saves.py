"""Saves that are written while training goes on."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from core.checkpoint.saving import attempt, full_disk, is_rank, make_saver, names, nest, require
from harness import Ranks
from lightning_accel.core.checkpoint import Shard, load, saver, writing


@contextmanager
def held() -> Iterator[threading.Event]:
    """Nothing is written before the event is set."""
    event, write_file = threading.Event(), writing.write_file

    def wait(*arguments: Any) -> Any:
        assert event.wait(60)
        return write_file(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "write_file", wait)
        try:
            yield event
        finally:
            event.set()


def save_and_go_on(folder: Path) -> None:
    made = make_saver()
    mine = torch.full((25_000,), float(dist.get_rank()))
    numbers = [1, 2]
    saved = {
        "state_dict": {"w": Shard.of_range((50_000,), (1,), dist.get_rank() * 25_000, mine)},
        "number": 0.0,
        "list": numbers,
        "large": (large := torch.zeros(30_000)),
    }
    done: list[str] = []
    with held() as event:
        made.save(folder / "it", saved, background=True)
        assert made.is_saving
        assert not (folder / "it").exists()
        mine.add_(100)
        large.add_(100)
        numbers.append(3)
        made.after(lambda: done.append("first"))
        made.check()  # nothing has failed
        dist.all_reduce(torch.ones(1))  # training sends messages of its own meanwhile
        assert done == []
        event.set()
        made.finish()
    assert done == ["first"]
    made.after(lambda: done.append("second"))
    assert done == ["first", "second"], "nothing is under way: at once"
    assert not made.is_saving
    made.finish()


def test_what_is_saved_in_the_background_is_what_was_there_at_the_call(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(save_and_go_on, tmp_path)
    require(tmp_path / "it", 0.0)
    found = load(tmp_path / "it")
    assert found["list"] == [1, 2]
    assert not found["large"].full().any()


def save_twice(folder: Path) -> bool:
    made = make_saver()
    with held() as event:
        made.save(folder / "it", nest(0), background=True)
        threading.Timer(0.2, event.set).start()
        made.save(folder / "it", nest(1), background=True)  # waits for the first one
        first = (folder / "it").exists()
        made.finish()
    return first


def test_a_save_waits_for_the_one_before(ranks2: Ranks, tmp_path: Path) -> None:
    assert ranks2.run(save_twice, tmp_path) == [True, True]
    require(tmp_path / "it", 1)


def fail_and_ask(folder: Path, how: str) -> tuple[Any, list[str], bool]:
    made = make_saver()
    done: list[str] = []

    def ask() -> None:
        if how == "check":
            while made._thread is not None:
                made.check()
        elif how == "finish":
            made.finish()
        else:
            made.save(folder / "next", nest(2))

    with full_disk(on=1, after=10):
        made.save(folder / "it", nest(1), background=True)
        made.after(lambda: done.append("removed the former one"))
        failed = attempt(ask)
    made.after(lambda: done.append("next"))
    made.finish()  # it was told: once is enough
    return failed, done, (folder / "next").exists()


@pytest.mark.parametrize("how", ["check", "finish", "save"])
def test_a_failure_in_the_background_is_raised_where_it_is_asked_for(ranks2: Ranks, how: str, tmp_path: Path) -> None:
    for failed, done, saved_next in ranks2.run(fail_and_ask, tmp_path, how):
        assert failed is not None
        assert failed[0] == "OSError"
        assert "Rank 1 could not write" in failed[1]
        assert done == ["next"], "what was to be done after it is not done"
        assert not saved_next
    assert names(tmp_path) == []


def fail_afterwards(folder: Path) -> list[Any]:
    """What was to be done after a save fails on one rank only; all ranks must learn of it."""
    made = make_saver()
    with held() as event:
        made.save(folder / "it", nest(1), background=True)
        made.after(lambda: 1 / int(not is_rank(0)))
        event.set()
        assert made._thread is not None
        made._thread.join()
    return [attempt(lambda: made.save(folder / "next", nest(2))), attempt(lambda: made.save(folder / "next", nest(3)))]


def test_a_failure_of_one_rank_in_the_background_is_raised_on_all_at_the_next_save(
    ranks2: Ranks, tmp_path: Path
) -> None:
    for first, second in ranks2.run(fail_afterwards, tmp_path):
        assert first == ("ZeroDivisionError", "division by zero")
        assert second is None
    require(tmp_path / "it", 1)
    require(tmp_path / "next", 3)


AT_EXIT = """
import sys
sys.modules["lightning"] = None  # takes seconds to import, and the core does without
import torch
from lightning_accel.core.checkpoint import Saver, writing, saver

def fail(*_):
    raise OSError(28, "No space left on device")

def main(path):
    made = Saver()
    if sys.argv[2] != "succeed":
        saver.write_file = fail
    made.save(path, {"a": torch.ones(30_000)}, background=True)
    if sys.argv[2] == "asked":
        try:
            made.finish()
        except OSError:
            print("told")
    print("end of the script", end="")

if sys.argv[3] == "fork":
    import multiprocessing
    process = multiprocessing.get_context("fork").Process(target=main, args=(sys.argv[1],))
    process.start()
    process.join()
    sys.exit(process.exitcode)
main(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("how", "start", "code"),
    [
        ("fail", "", 1),
        ("fail", "fork", 1),
        ("asked", "", 0),
        pytest.param("succeed", "", 0, marks=pytest.mark.matrix),
        pytest.param("succeed", "fork", 0, marks=pytest.mark.matrix),
    ],
)
def test_a_failure_that_nobody_has_asked_for_is_shown_at_exit(how: str, start: str, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path / "it"), how, start]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == code, finished.stderr
    assert finished.stdout.endswith("end of the script")
    shown = "Traceback" in finished.stderr and f"Rank 0 could not write the checkpoint {tmp_path}" in finished.stderr
    assert shown == (how == "fail"), finished.stderr
    assert names(tmp_path) == (["it"] if how == "succeed" else [])
