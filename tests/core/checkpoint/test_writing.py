"""A chunk is what torch.save makes of the tensor."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.serialization import get_crc32_options, set_crc32_options

from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.writing import write_file

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (0, 3), (1,), (7, 5), (512, 513), (1024, 257)]  # the last of float32 is larger than a megabyte


def saved_by_torch(value: Tensor) -> bytes:
    former = get_crc32_options()
    set_crc32_options(False)
    try:
        torch.save(value, content := io.BytesIO())
    finally:
        set_crc32_options(former)
    return content.getvalue()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_chunks_are_byte_by_byte_those_of_torch_save(tmp_path: Path, dtype: torch.dtype) -> None:
    values = [(torch.rand(shape) * 9 - 4).to(dtype) for shape in SHAPES for _ in range(2)]
    parts = {MetadataIndex(str(number)): value for number, value in enumerate(values)}
    written = write_file(Folder(str(tmp_path)), "file", parts)
    content = (tmp_path / "file").read_bytes()
    for index, value in parts.items():
        place = written.places[index]
        assert content[place.offset : place.offset + place.length] == saved_by_torch(value), index
    assert sum(place.length for place in written.places.values()) == len(content)


def test_of_a_view_nothing_but_its_values_is_saved(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    parts = {MetadataIndex("columns"): base[:, 2:4], MetadataIndex("conjugate"): torch.tensor([1 + 2j]).conj()}
    written = write_file(Folder(str(tmp_path)), "file", parts)
    content = (tmp_path / "file").read_bytes()
    for index, value in parts.items():
        place = written.places[index]
        body = io.BytesIO(content[place.offset : place.offset + place.length])
        found = torch.load(body, weights_only=True)
        assert torch.equal(found, value)
        assert found.untyped_storage().nbytes() == value.numel() * value.element_size()
