"""All ranks save together: who writes what, and what becomes of it if one of them fails."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core.toys import adamw, started
from harness import Ranks
from lightning_accel.core.checkpoint import Reader, Saver, Shard, load, saver, writing
from lightning_accel.core.checkpoint.engine_state import model_shards, optimizer_shards
from lightning_accel.core.checkpoint.folder import Folder


def gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def make_saver() -> Saver:
    return Saver(gather, dist.get_rank())


def part(numel: int = 50_000, value: float = 0.0) -> Shard:
    """This rank's part of a tensor that is divided evenly."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine = torch.full((numel // ranks,), value + rank)
    return Shard.of_range((numel,), (1,), rank * len(mine), mine)


def nest(value: float = 0.0) -> dict[str, Any]:
    return {"state_dict": {"w": part(value=value)}, "number": value}


def expected(value: float, ranks: int = 2, numel: int = 50_000) -> Tensor:
    return torch.cat([torch.full((numel // ranks,), value + rank) for rank in range(ranks)])


def require(path: Path, value: float, ranks: int = 2) -> None:
    found = load(path)
    assert found["number"] == value
    assert torch.equal(found["state_dict"]["w"].full(), expected(value, ranks))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ------------------------------------------------------------------------ who writes what


def save_differently(folder: Path) -> list[int]:
    """How often plans were made, after each of several saves."""
    made = make_saver()
    plan, count, counts = saver._plan, 0, []

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return plan(*arguments)

    extra = {"extra": torch.ones(30_000)} if dist.get_rank() == 0 else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "_plan", counted)
        for number, saved in enumerate([nest(0), nest(1), nest(2) | extra, nest(3) | extra, nest(4)]):
            made.save(folder / str(number), saved)
            counts.append(count)
    return counts


def test_who_writes_what_is_planned_once_for_each_shape_of_the_checkpoint(ranks2: Ranks, tmp_path: Path) -> None:
    for counts in ranks2.run(save_differently, tmp_path):
        assert counts == [1, 1, 2, 2, 3]
    for number in range(5):
        require(tmp_path / str(number), number)
        assert ("extra" in load(tmp_path / str(number))) == (number in (2, 3))


def save_copies(path: Path) -> None:
    copies = {f"w{index}": Shard.whole(torch.full((1000,), float(index))) for index in range(7)}
    make_saver().save(path, {"a": copies | {"large": Shard.whole(torch.ones(5000))}})


def test_what_all_ranks_have_is_written_once_and_shared_out_evenly(ranks3: Ranks, tmp_path: Path) -> None:
    ranks3.run(save_copies, tmp_path / "it")
    sizes = [(tmp_path / f"it/__{rank}_0.distcp").stat().st_size for rank in range(3)]
    assert 48_000 < sum(sizes) < 48_000 + 8 * 2048, "each chunk has a header of less than two thousand bytes"
    assert min(sizes) > 2 * 4000
    assert max(sizes) < min(sizes) + 20_000 + 4096, "they differ by no more than the largest"
    found = load(tmp_path / "it")["a"]
    assert all(torch.equal(found[f"w{index}"].full(), torch.full((1000,), float(index))) for index in range(7))


def save_engine(row: str, folder: Path) -> None:
    engine, optimizer = started(row, lambda: torch.nn.Sequential(*(torch.nn.Linear(101, 101) for _ in range(3))), adamw)
    engine.backward(engine.module(torch.ones(2, 101).double()).sum())
    optimizer.step()
    saved = {"model": model_shards(engine), "optimizer": optimizer_shards(engine.find_optimizer(optimizer))}
    make_saver().save(folder / row, saved)
    engine.close()


@pytest.mark.parametrize("row", ["ddp", "zero2", "fsdp"])
def test_each_rank_writes_its_share_of_the_bytes(ranks3: Ranks, row: str, tmp_path: Path) -> None:
    ranks3.run(save_engine, row, tmp_path)
    sizes = [entry.stat().st_size for entry in (tmp_path / row).iterdir() if entry.name.endswith(".distcp")]
    state = 3 * (101 * 101 + 101) * 8 * 3  # a value and two moments
    assert len(sizes) == 3
    assert state < sum(sizes) < 1.25 * state
    assert max(sizes) < (1 / 3 + 0.12) * sum(sizes)


def save_own_values(path: Path) -> None:
    rank = dist.get_rank()
    buffers = {"running": torch.full((4,), float(rank)), "large": torch.full((30_000,), float(rank))}
    if rank == 1:
        buffers["only there"] = torch.ones(30_000)
    saved = {"state_dict": {"w": part()} | buffers, "large": torch.full((40_000 + rank,), float(rank)), "number": rank}
    make_saver().save(path, saved)


def test_what_no_rank_has_a_part_of_is_rank_0s(ranks2: Ranks, tmp_path: Path) -> None:
    """Buffers may differ between ranks; a mixture of them would be nobody's."""
    ranks2.run(save_own_values, tmp_path / "it")
    found = load(tmp_path / "it")
    assert found["state_dict"].keys() == {"w", "running", "large"}
    for tensor in (found["state_dict"]["running"], found["state_dict"]["large"], found["large"]):
        assert torch.equal(tensor.full() if hasattr(tensor, "full") else tensor, torch.zeros(tensor.shape))
    assert found["large"].shape == (40_000,)
    assert found["number"] == 0


def save_tied(path: Path) -> None:
    shard = part()
    whole = torch.ones(30_000)
    saved = {"a": {"w": shard, "v": shard}, "b": [whole, whole]}
    if dist.get_rank() == 1:  # its own are one tensor, rank 0's are not
        saved["c"], saved["d"] = whole, whole
    else:
        saved["c"], saved["d"] = torch.zeros(30_000), torch.full((30_000,), 2.0)
    make_saver().save(path, saved)


def test_what_is_one_tensor_is_saved_once(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(save_tied, tmp_path / "it")
    found = load(tmp_path / "it")
    assert found["a"]["w"] is found["a"]["v"]
    assert found["b"][0] is found["b"][1]
    assert torch.equal(found["a"]["v"].full(), expected(0.0))
    assert (found["c"][0], found["d"][0]) == (0, 2)
    sizes = [(tmp_path / f"it/__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert sum(sizes) < (50_000 + 3 * 30_000) * 4 + 8 * 4096


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    Saver().save(tmp_path / "it", {"a": 1, "b": {}})
    assert load(tmp_path / "it") == {"a": 1, "b": {}}


def test_what_the_manifest_says(tmp_path: Path) -> None:
    Saver().save(tmp_path / "it", {"a": 1}, info={"step": 7})
    manifest = Reader(tmp_path / "it").manifest
    assert manifest is not None
    assert manifest.info.keys() == {"step", "lightning_accel", "torch", "created", "time", "run", "world_size"}
    assert (manifest.info["step"], manifest.info["world_size"]) == (7, 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest.info["created"])


# ------------------------------------------------------------------------------ failures


def attempt(do: Callable[[], Any]) -> tuple[str, str] | None:
    """What a rank has raised. That its peers answer afterwards shows that none is ahead of the others."""
    outcome = None
    try:
        do()
    except Exception as error:
        outcome = type(error).__name__, str(error)
    assert gather("here") == ["here"] * dist.get_world_size()
    return outcome


@contextmanager
def full_disk(on: int, after: int = 100_000) -> Iterator[None]:
    """The disk of a rank takes so many bytes and no more."""

    class Full:
        def __init__(self, stream: IO[bytes]) -> None:
            self.stream, self.left = stream, after

        def write(self, content: Any) -> int:
            self.left -= memoryview(content).nbytes
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.stream.write(content)

        def flush(self) -> None:
            self.stream.flush()

    create = Folder.create

    @contextmanager
    def limited(self: Folder, name: str) -> Iterator[Any]:
        with create(self, name) as stream:
            yield Full(stream) if name.startswith(f"__{on}_") else stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "create", limited)
        yield


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


def is_rank(rank: int) -> bool:
    return dist.get_rank() == rank


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


# ------------------------------------------------------------------------ in the background


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
import sys, torch
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


# ------------------------------------------------------------------------ frozen tensors


def frozen_nest(frozen: Tensor, trained: float) -> dict[str, Any]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    size = len(frozen) // ranks
    mine = frozen[rank * size : (rank + 1) * size]
    shards = {
        "frozen": Shard.of_range(frozen.shape, (1,), rank * size, mine, frozen=True),
        "trained": Shard.of_range((ranks,), (1,), rank, torch.tensor([trained])),
    }
    return {"state_dict": shards, "number": trained}


def save_frozen(folder: Path) -> None:
    made = make_saver()
    frozen = torch.arange(40_000.0)
    for number in range(3):
        made.save(folder / str(number), frozen_nest(frozen, number), background=number == 1)
    made.finish()
    frozen[0] = -1  # of rank 0's part
    made.save(folder / "changed", frozen_nest(frozen, 3))
    made.save(folder / "last", frozen_nest(frozen, 4))
    made.save(folder / "last", frozen_nest(frozen, 5))  # over the one that the file is in
    if is_rank(0):
        Folder(folder / "last").remove()
    dist.barrier()
    made.save(folder / "later", frozen_nest(frozen, 6))  # there is nothing to share any more


def test_files_of_frozen_tensors_are_shared_with_the_checkpoint_before(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(save_frozen, tmp_path)

    def file(name: str, rank: int) -> int:
        return (tmp_path / name / f"__{rank}_1.distcp").stat().st_ino

    for rank in range(2):
        assert file("0", rank) == file("1", rank) == file("2", rank)
    assert file("changed", 0) != file("2", 0)
    assert file("changed", 1) == file("2", 1), "of rank 1 nothing has changed"
    assert (tmp_path / "0/__0_0.distcp").stat().st_ino != (tmp_path / "1/__0_0.distcp").stat().st_ino
    assert file("later", 1) != file("changed", 1)
    for name in ("0", "1"):
        Folder(tmp_path / name).remove()
    for name, number in (("2", 2.0), ("changed", 3.0), ("later", 6.0)):
        found = load(tmp_path / name)
        values = torch.arange(40_000.0)
        values[0] = 0.0 if name == "2" else -1.0
        assert torch.equal(found["state_dict"]["frozen"].full(), values)
        assert torch.equal(found["state_dict"]["trained"], torch.full((2,), number))


def test_another_file_of_the_same_name_is_not_shared(tmp_path: Path) -> None:
    one, two = Saver(), Saver()
    frozen = torch.arange(40_000.0)
    one.save(tmp_path / "it", frozen_nest(frozen, 0))
    two.save(tmp_path / "it", frozen_nest(-frozen, 0))
    one.save(tmp_path / "next", frozen_nest(frozen, 1))
    assert torch.equal(load(tmp_path / "next")["state_dict"]["frozen"].full(), frozen)
    assert (tmp_path / "it/__0_1.distcp").stat().st_nlink == 1


def test_a_failed_save_does_not_count_as_the_checkpoint_before(tmp_path: Path) -> None:
    made = Saver()
    frozen = torch.arange(40_000.0)
    made.save(tmp_path / "0", frozen_nest(frozen, 0))
    with pytest.raises(RuntimeError, match="not JSON"):
        made.save(tmp_path / "1", frozen_nest(-frozen, 1), info={"not JSON": object()})
    made.save(tmp_path / "2", frozen_nest(frozen, 2))
    assert (tmp_path / "2/__0_1.distcp").samefile(tmp_path / "0/__0_1.distcp")


def test_remote_checkpoints_share_no_files() -> None:
    made = Saver()
    for number in range(2):
        made.save(f"memory://frozen/{number}", frozen_nest(torch.arange(40_000.0), number))
    Folder("memory://frozen/0").remove()
    assert torch.equal(load("memory://frozen/1")["state_dict"]["frozen"].full(), torch.arange(40_000.0))
