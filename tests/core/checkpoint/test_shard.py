"""Parts of tensors: torch.distributed.checkpoint saves and loads them itself; nothing computes with them."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from harness import Ranks
from lightning_accel.core.checkpoint import Shard, load, open_dcp, save
from lightning_accel.core.checkpoint import shard as shard_module
from lightning_accel.core.checkpoint.boxes import Box

SHAPE = (5, 3, 7)


def whole_tensor(channels_last: bool) -> Tensor:
    numbers = torch.arange(5 * 3 * 7, dtype=torch.float64)
    return numbers.view(5, 7, 3).transpose(1, 2) if channels_last else numbers.view(SHAPE)


def my_shard(tensor: Tensor, cuts: list[int]) -> tuple[Shard, Tensor]:
    """A range of the tensor's memory that is this rank's, and that memory."""
    start, stop = cuts[dist.get_rank()], cuts[dist.get_rank() + 1]
    mine = tensor.as_strided((tensor.numel(),), (1,))[start:stop].clone()
    return Shard.of_range(tensor.shape, tensor.stride(), start, mine), mine


def save_with_dcp(folder: Path, channels_last: bool) -> None:
    shard, _ = my_shard(whole_tensor(channels_last), [0, 38, 105])
    dcp.save({"model": {"a": shard, "b": torch.ones(2)}}, storage_writer=dcp.FileSystemWriter(folder))


def load_with_dcp(folder: Path, channels_last: bool, cuts: list[int], row_major: bool = False) -> None:
    tensor = whole_tensor(channels_last)
    if row_major:
        tensor = tensor.contiguous()
    shard, mine = my_shard(tensor, cuts)
    expected = mine.clone()
    mine.fill_(-1)
    full = torch.zeros(SHAPE, dtype=torch.float64)
    dcp.load({"model": {"a": shard}}, storage_reader=dcp.FileSystemReader(folder))
    assert torch.equal(mine, expected)
    dcp.load({"model": {"a": full}}, storage_reader=dcp.FileSystemReader(folder))
    assert torch.equal(full, tensor)


@pytest.mark.parametrize("channels_last", [False, True])
def test_dcp_saves_parts_of_any_range_and_loads_them_whole_or_in_others(
    ranks2: Ranks, ranks3: Ranks, channels_last: bool, tmp_path: Path
) -> None:
    ranks2.run(save_with_dcp, tmp_path, channels_last)
    ranks3.run(load_with_dcp, tmp_path, channels_last, [0, 1, 99, 105])
    ranks3.run(load_with_dcp, tmp_path, channels_last, [0, 0, 50, 105], row_major=True)
    ours = open_dcp(tmp_path)["model"]
    assert torch.equal(ours["a"].full(), whole_tensor(channels_last))
    assert torch.equal(ours["b"].full(), torch.ones(2))


def test_dcp_reads_what_we_have_saved(tmp_path: Path) -> None:
    tensor = torch.randn(40, 50)
    save(tmp_path / "ours", {"state_dict": {"w": tensor, "v": Shard.whole(torch.ones(3))}})
    found = {"state_dict": {"w": torch.zeros(40, 50), "v": torch.zeros(3)}}
    dcp.load(found, checkpoint_id=str(tmp_path / "ours"), no_dist=True)
    assert torch.equal(found["state_dict"]["w"], tensor)
    assert torch.equal(found["state_dict"]["v"], torch.ones(3))


def test_large_tensors_are_cut_into_chunks_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shard_module, "CHUNK_BYTES", 100)
    tensor = torch.randn(7, 11)
    shard = Shard.whole(tensor)
    assert max(values.nbytes for _, values in shard.parts.values()) <= 100
    save(tmp_path / "it", {"w": shard})
    stored = load(tmp_path / "it")["w"]
    assert len(stored.boxes) == len(shard.parts) > 1
    assert torch.equal(stored.full(), tensor)


def test_parts_are_views_until_they_are_written(tmp_path: Path) -> None:
    tensor = torch.zeros(4, 4)
    shard = Shard.whole(tensor)
    tensor.fill_(3)
    save(tmp_path / "it", {"w": shard})
    assert torch.equal(load(tmp_path / "it")["w"].full(), torch.full((4, 4), 3.0))


VALUES_WANTED = {
    "add": lambda part: part + 1,
    "add to another": lambda part: torch.add(torch.ones(2, 3), other=part),
    "cat": lambda part: torch.cat([torch.ones(2, 3), part]),
    "compare": lambda part: torch.equal(part, torch.ones(2, 3)),
    "convert": lambda part: part.half(),
    "clone": lambda part: part.clone(),
    "deepcopy": copy.deepcopy,
    "view": lambda part: part.view(-1),
    "index": lambda part: part[0],
    "iterate": list,
    "in place": lambda part: part.zero_(),
    "numpy": lambda part: part.numpy(),
    "list": lambda part: part.tolist(),
    "memory": lambda part: part.untyped_storage(),
    "address": lambda part: part.data_ptr(),
    "share": lambda part: part.share_memory_(),  # torch would crash the process
}


@pytest.mark.parametrize("what", VALUES_WANTED)
def test_nothing_computes_with_parts(what: str) -> None:
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\).*each rank has a part.*state_dict_type='full'"):
        VALUES_WANTED[what](Shard.whole(torch.ones(2, 3)))


@pytest.mark.parametrize("dump", [pickle.dumps, lambda part: torch.save({"w": part}, io.BytesIO()), copy.copy])
def test_parts_are_not_pickled(dump: Any) -> None:
    with pytest.raises(TypeError, match="saved by the strategy that made them.*state_dict_type='full'"):
        dump(Shard.whole(torch.ones(2, 3)))


def test_what_needs_no_values_is_answered() -> None:
    part = Shard.of_range((2, 3), (3, 1), 1, torch.ones(2, dtype=torch.float64))
    assert (part.shape, part.dtype, part.numel(), part.device.type) == ((2, 3), torch.float64, 6, "cpu")
    assert repr(part) == f"Shard(shape=(2, 3), dtype=torch.float64, boxes=[{Box((0, 1), (1, 2))}])"
    assert part.detach() is part
    assert part.cpu() is part
