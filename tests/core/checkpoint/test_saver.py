"""All ranks save together: who writes what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from core.checkpoint.saving import expected, make_saver, nest, part, require
from core.toys import adamw, started
from harness import Ranks
from lightning_accel.core.checkpoint import Reader, Saver, Shard, load, saver
from lightning_accel.core.checkpoint.engine_state import model_shards, optimizer_shards


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
