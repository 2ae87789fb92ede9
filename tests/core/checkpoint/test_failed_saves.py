"""All ranks save together: what becomes of it if one of them fails."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from core.checkpoint.saving import attempt, full_disk, is_rank, make_saver, names, nest, part, require
from harness import Ranks
from lightning_accel.core.checkpoint import Saver, Shard, load, saver
from lightning_accel.core.checkpoint.folder import Folder


def fill_disk(path: Path, background: bool) -> list[Any]:
    made = make_saver()
    made.save(path, nest(0))

    def save() -> None:
        made.save(path, nest(1) | {"more": part(500_000)}, background=background)
        made.finish()

    with full_disk(on=1):
        outcomes = [attempt(save)]
    outcomes.append(sorted(entry.name for entry in path.parent.iterdir()))
    dist.barrier()
    outcomes.append(attempt(lambda: made.save(path.with_name("next"), nest(2))))
    return outcomes


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_on_one_rank(ranks2: Ranks, background: bool, tmp_path: Path) -> None:
    path = tmp_path / "it"
    for failed, left, after in ranks2.run(fill_disk, path, background):
        kind, message = failed
        assert kind == "OSError"
        assert f"Rank 1 could not write the checkpoint {path}: No space left on device." in message
        assert f"Free space on the disk of {path}" in message
        assert left == ["it"], "the temporary folder is gone"
        assert after is None
    require(path, 0)
    require(tmp_path / "next", 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("mebibytes", [0.9, 1.1, 30])
def test_a_disk_that_is_really_full(small_disk: Path, mebibytes: float) -> None:
    """torch.save makes an error of its own of what a stream raises; the disk's is the one to show."""
    Saver().save(small_disk / "it", {"a": torch.ones(50_000), "number": 1})
    with pytest.raises(OSError, match=f"checkpoint {small_disk}/it: No space left on device") as caught:
        Saver().save(small_disk / "it", {"a": torch.ones(int(mebibytes * 2**18)), "number": 2})
    assert caught.value.errno == errno.ENOSPC
    assert names(small_disk) == ["it"]
    assert load(small_disk / "it")["number"] == 1
    assert torch.equal(load(small_disk / "it")["a"].full(), torch.ones(50_000))


class Unpicklable:
    def __reduce__(self) -> Any:
        raise LookupError("this object cannot be saved")


def unpicklable_on_rank_0(folder: Path, made: Saver) -> None:
    made.save(folder / "it", nest() | {"own": Unpicklable() if is_rank(0) else None})


def another_type_on_rank_1(folder: Path, made: Saver) -> None:
    made.save(folder / "it", [1, 2] if is_rank(1) else nest())  # type: ignore[arg-type]


def two_tensors_of_one_name_on_rank_1(folder: Path, made: Saver) -> None:
    a = {"b.c": part(), "d": part()}
    made.save(folder / "it", {"a": a} | ({"a.b": {"c": part()}} if is_rank(1) else {}))


def one_name_on_two_ranks(folder: Path, made: Saver) -> None:
    made.save(folder / "it", {"a": {"b.c": part()}} if is_rank(1) else {"a.b": {"c": part()}})


def different_paths(folder: Path, made: Saver) -> None:
    made.save(folder / f"it{dist.get_rank()}", nest())


def no_path_on_rank_1(folder: Path, made: Saver) -> None:
    made.save(7 if is_rank(1) else folder / "it", nest())  # type: ignore[arg-type]


def unknown_protocol(folder: Path, made: Saver) -> None:
    made.save("nosuchthing://it", nest())


def something_else_is_there(folder: Path, made: Saver) -> None:
    made.save(folder / "other", nest())


def parts_that_do_not_add_up(folder: Path, made: Saver) -> None:
    made.save(folder / "it", {"a": Shard.of_range((10,), (1,), 0, torch.ones(5))})


def not_shared(folder: Path, made: Saver) -> None:
    exists = Folder.exists
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "exists", lambda self: not is_rank(1) and exists(self))
        made.save(folder / "it", nest())


def cannot_plan_on_rank_1(folder: Path, made: Saver) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if is_rank(1):
            patch.setattr(Shard, "__create_write_items__", lambda *_: 1 / 0)
        made.save(folder / "it", nest())


def cannot_copy_on_rank_1(folder: Path, made: Saver) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no host memory")

    with pytest.MonkeyPatch.context() as patch:
        if is_rank(1):
            patch.setattr(saver, "host_copies", fail)
        made.save(folder / "it", nest(), background=True)


def cannot_complete(folder: Path, made: Saver) -> None:
    made.save(folder / "it", nest(), info={"not JSON": object()})


def rank_1_cannot_read_a_lazy_part(folder: Path, made: Saver) -> None:
    shard = part()
    if is_rank(1):
        shard.parts = {offsets: (box, lambda: 1 / 0) for offsets, (box, _) in shard.parts.items()}
    made.save(folder / "it", {"a": shard})


MISTAKES: list[tuple[Callable[[Path, Saver], None], str, str]] = [
    (unpicklable_on_rank_0, "LookupError", "this object cannot be saved"),
    (another_type_on_rank_1, "TypeError", "Expected a dictionary to save as a checkpoint, got a list"),
    (two_tensors_of_one_name_on_rank_1, "ValueError", r"\('a.b', 'c'\) and \('a', 'b.c'\) are both called 'a.b.c'"),
    (one_name_on_two_ranks, "ValueError", "are both called 'a.b.c'. Rename one of them"),
    (different_paths, "ValueError", r"same path on all ranks, got \['.*it0', '.*it1'\].*broadcast it"),
    (no_path_on_rank_1, "TypeError", "int"),
    (unknown_protocol, "ValueError", "nosuchthing"),
    (something_else_is_there, "ValueError", "folder of something else"),
    (parts_that_do_not_add_up, "ValueError", "(?s)validate global plan.*a"),
    (not_shared, "ValueError", r"file system that all ranks share, but ranks \[1\] do not see.*state_dict_type='full'"),
    (cannot_plan_on_rank_1, "ZeroDivisionError", "division by zero"),
    (cannot_copy_on_rank_1, "MemoryError", "no host memory"),
    (cannot_complete, "RuntimeError", "Rank 0 could not write.*not JSON serializable"),
    (rank_1_cannot_read_a_lazy_part, "RuntimeError", "Rank 1 could not write.*division by zero"),
]


def make_mistakes(folder: Path) -> list[tuple[Any, Any, list[str]]]:
    made, outcomes = make_saver(), []
    for mistake, *_ in MISTAKES:
        failed = attempt(lambda mistake=mistake: mistake(folder, made))  # type: ignore[misc]
        left = names(folder)
        dist.barrier()
        outcomes.append((failed, attempt(lambda: made.save(folder / "kept", nest(1))), left))
    return outcomes


def test_whatever_one_rank_fails_with_all_raise_and_can_save_again(ranks2: Ranks, tmp_path: Path) -> None:
    """One call for all mistakes: a hang would be the harness' timeout."""
    (tmp_path / "other/project").mkdir(parents=True)
    for outcomes in ranks2.run(make_mistakes, tmp_path):
        for (mistake, kind, message), (failed, after, left) in zip(MISTAKES, outcomes, strict=True):
            assert failed is not None, mistake.__name__
            assert failed[0] == kind, (mistake.__name__, failed)
            assert re.search(message, failed[1]), (mistake.__name__, failed)
            assert after is None, mistake.__name__
            assert {*left} <= {"kept", "other"}, mistake.__name__
    require(tmp_path / "kept", 1)
