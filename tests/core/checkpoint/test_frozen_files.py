"""Tensors that do not change are in files that checkpoints share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core.checkpoint.saving import is_rank, make_saver
from harness import Ranks
from lightning_accel.core.checkpoint import Saver, Shard, load
from lightning_accel.core.checkpoint.folder import Folder


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
