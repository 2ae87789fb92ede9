"""Directories that the strategies have written, and those that they go on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from checkpoints import assert_same
from models import Regression, SaveAtEnd, assert_close, fit, loader, make
from torch import Tensor

from harness import Ranks
from lightning_accel.convert import convert, inspect
from lightning_accel.convert.sharded import save_ours
from lightning_accel.core.checkpoint import StoredTensor, load, shard
from lightning_accel.core.checkpoint.boxes import Box
from rows import everyday


def stop(row: str, path: Path) -> None:
    make(row, max_epochs=2, callbacks=[SaveAtEnd(path)]).fit(Regression(), loader())


@pytest.mark.parametrize("row", everyday(["zero1", "zero2", "fsdp"]))
def test_runs_go_on_from_what_was_converted(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    """A directory of two ranks on one device, as a file; then a directory made of that file on two ranks."""
    ranks2.run(stop, row, tmp_path / "parts")
    assert inspect(tmp_path / "parts").world_size == 2
    assert inspect(tmp_path / "parts").optimizers[0].by_name
    convert(tmp_path / "parts", tmp_path / "whole.ckpt")
    expected = fit("auto", max_epochs=4)
    assert_close(fit("auto", ckpt_path=tmp_path / "whole.ckpt", max_epochs=4), expected)

    convert(tmp_path / "whole.ckpt", tmp_path / "again", to="sharded")  # its optimizer has numbers
    nest, first = load(tmp_path / "again"), load(tmp_path / "parts")
    assert_same(dict(nest["state_dict"]), {name: entry.full() for name, entry in first["state_dict"].items()})
    for result in ranks2.run(fit, row, ckpt_path=tmp_path / "again", max_epochs=4):
        assert_close(result, expected)


class Source:
    """Tensors that are read one by one; counts how often."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def fill(self, key: str, targets: Sequence[tuple[Box, Tensor]]) -> None:
        self.read.append(key)
        for box, target in targets:
            target.copy_(box.of(self.values(key)))

    def values(self, key: str) -> Tensor:
        return torch.arange(300.0).view(30, 10) + 1000 * float(key)

    def tensor(self, key: int) -> StoredTensor:
        return StoredTensor(cast(Any, self), str(key), (30, 10), torch.float32)


def test_what_is_written_in_parts_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "CHUNK_BYTES", 256)  # five parts of each
    source, done = Source(), []
    model = {str(key): source.tensor(key) for key in range(3)}
    save_ours(tmp_path / "ours", {"state_dict": {**model, "tied": model["1"]}}, {}, done.append)
    assert source.read == ["0", "1", "2"]
    assert done == [1200] * 3
    found = load(tmp_path / "ours")["state_dict"]
    assert_same(found, {**{key: source.values(key) for key in "012"}, "tied": source.values("1")})
    assert found["tied"] is found["1"]
