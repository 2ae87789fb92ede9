"""What torch.load reads, written tensor by tensor."""

from __future__ import annotations

import errno
import io
import weakref
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from convert.checkpoints import assert_same, trainer_checkpoint
from lightning_accel.convert.joined import join
from lightning_accel.core.checkpoint import StoredTensor
from lightning_accel.core.checkpoint.boxes import Box
from lightning_accel.core.checkpoint.streamed_save import streamed_save


def saved(nest: Any) -> bytes:
    stream = io.BytesIO()
    streamed_save(nest, stream, lambda nbytes: None)
    return stream.getvalue()


def loaded(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def test_torch_reads_what_torch_would_have_written(tmp_path: Path) -> None:
    checkpoint = trainer_checkpoint()
    content = saved(checkpoint)
    assert_same(loaded(content), checkpoint)
    (tmp_path / "mapped.ckpt").write_bytes(content)
    mapped = torch.load(tmp_path / "mapped.ckpt", weights_only=True, mmap=True)
    assert_same(mapped, checkpoint)
    assert mapped["state_dict"]["second.weight"].data_ptr() % 64 == 0
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None  # whole, with the checksums that it says


def test_a_view_is_written_without_the_rest_of_its_memory() -> None:
    whole = torch.randn(1000, 100)
    content = saved({"row": whole[3], "column": whole[:, 3], "same row": whole[3]})
    assert len(content) < 3 * 4000
    found = loaded(content)
    assert_same(found, {"row": whole[3], "column": whole[:, 3], "same row": whole[3]})
    assert found["row"].data_ptr() == found["same row"].data_ptr()


class Source:
    """Makes tensors that are read one by one, and counts those that are still there."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def fill(self, key: str, targets: Sequence[tuple[Box, Tensor]]) -> None:
        for _, target in targets:
            target.fill_(float(key))
            self.alive.add(target)
            self.most = max(self.most, len(self.alive))

    def tensor(self, key: int) -> StoredTensor:
        return StoredTensor(cast(Any, self), str(key), (4, 5), torch.float32)


def test_one_tensor_is_in_memory_at_a_time() -> None:
    source, done = Source(), []
    stream = io.BytesIO()
    streamed_save({"model": [source.tensor(key) for key in range(6)]}, stream, done.append)
    assert source.most <= 2  # the next one is read before the name of the last is given to it
    assert done == [80] * 6
    assert_same(loaded(stream.getvalue()), {"model": [torch.full((4, 5), float(key)) for key in range(6)]})


def test_parts_are_joined_when_they_are_written() -> None:
    values = torch.randn(4, 5)
    flat = values.view(-1)
    tensor = join("weight", [flat[:3], flat[3:3], flat[3:17], flat[17:]], (4, 5))
    assert isinstance(tensor, StoredTensor)
    assert_same(loaded(saved({"weight": tensor})), {"weight": values})
    part = torch.empty(2, 2, dtype=torch.float64)
    tensor.fill([(Box((1, 2), (2, 2)), part)])
    assert torch.equal(part, values[1:3, 2:4].double())


class Full:
    """A stream of a disk that fills up."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, content: Any) -> int:
        self.room -= memoryview(content).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return memoryview(content).nbytes


@pytest.mark.parametrize("missing", [1, 20_000, 50_000, 57_000])
def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(missing: int) -> None:
    """The writer is C++, and ends the process if it has to finish in vain when it is deleted."""
    nest = {"a": torch.zeros(7000), "b": torch.zeros(7000)}
    with pytest.raises(OSError, match="No space left"):
        streamed_save(nest, cast(Any, Full(len(saved(nest)) - missing)), lambda nbytes: None)


def test_an_error_while_reading_is_raised() -> None:
    class Damaged(Source):
        def fill(self, key: str, targets: Sequence[tuple[Box, Tensor]]) -> None:
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        saved({"a": torch.ones(3), "b": Damaged().tensor(1)})


class Other(Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), Other(torch.ones(3))],
    ids=["sparse", "quantized", "subclass"],
)
def test_what_is_more_than_values_is_refused(tensor: Tensor) -> None:
    with pytest.raises(ValueError, match="Expected plain tensors, got one of class"):
        saved({"a": tensor})
