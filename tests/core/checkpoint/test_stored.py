"""Tensors that read themselves: when they do, and that they are like any other tensor."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_accel.core.checkpoint import Reader, StoredTensor, load, save
from lightning_accel.core.checkpoint import shard as shard_module
from lightning_accel.core.checkpoint.boxes import Box

# Large enough not to be put with the objects.
VALUES = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    save(tmp_path / "it", {"w": VALUES, "n": torch.arange(20_000)})
    return Reader(tmp_path / "it")


@pytest.fixture
def stored(reader: Reader) -> StoredTensor:
    return reader.tensors()["w",]


def length(reader: Reader, key: str) -> int:
    """Bytes that a tensor takes in files."""
    assert reader.manifest is not None
    infos = [info for index, info in reader.metadata.storage_data.items() if index.fqn == key]
    return sum(info.length for info in infos)


def test_nothing_is_read_before_a_value_is_needed(reader: Reader, stored: StoredTensor) -> None:
    assert (stored.shape, stored.dtype, stored.nbytes) == ((300, 100), torch.float32, 120_000)
    assert (stored.key, stored.boxes) == ("w", [Box((0, 0), (300, 100))])
    assert "w" in repr(stored)
    assert "(300, 100)" in repr(stored)
    for alias in (stored.detach(), stored.data, stored.cpu(), stored.to("cpu")):
        assert isinstance(alias, StoredTensor)
    assert reader.bytes_read == 0


def test_values_are_read_for_each_operation_and_forgotten(reader: Reader, stored: StoredTensor) -> None:
    for reads in (1, 2):
        total = stored.sum()
        assert type(total) is Tensor
        assert torch.equal(total, VALUES.sum())
        assert reader.bytes_read == reads * length(reader, "w")
    assert VALUES.nbytes < length(reader, "w") < VALUES.nbytes + 4096


OPERATIONS = {
    "arithmetic": lambda t: t * 2 + t,
    "on the right": lambda t: 1 - t,
    "matrix product": lambda t: t.t() @ t,
    "several": lambda t: torch.cat([t, torch.ones(1, 100)]),
    "list of tensors": lambda t: torch.stack([t, t]),
    "convert": lambda t: t.to(torch.float64),
    "slice": lambda t: t[5:7, ::2],
    "mask": lambda t: t[t > 0],
    "clone": lambda t: t.clone(),
    "iterate": lambda t: torch.stack(list(t)),
    "split": lambda t: t.chunk(3)[1],
    "keyword": lambda t: torch.add(input=t, other=t),
    "functional": lambda t: nn.functional.linear(torch.ones(2, 100), weight=t),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "contiguous": lambda t: t.contiguous() + 0,
    "parameter": lambda t: nn.Parameter(t) + 1,
}


@pytest.mark.parametrize("what", OPERATIONS)
def test_operations_give_what_they_give_of_ordinary_tensors(stored: StoredTensor, what: str) -> None:
    result = OPERATIONS[what](stored)
    assert type(result) is Tensor
    assert torch.equal(result, OPERATIONS[what](VALUES))


def test_numbers_and_arrays(reader: Reader, stored: StoredTensor) -> None:
    assert np.array_equal(stored.numpy(), VALUES.numpy())
    assert np.array_equal(np.asarray(stored), VALUES.numpy())
    assert stored.tolist() == VALUES.tolist()
    assert stored[3, 4].item() == VALUES[3, 4].item()
    assert int(reader.tensors()["n",][7]) == 7
    assert bool((stored == VALUES).all())


CHANGES = {
    "add": lambda t: t.add_(1),
    "fill": lambda t: t.fill_(2.0),
    "item": lambda t: t.__setitem__((0, 0), 5.0),
    "slice": lambda t: t[1:3].zero_(),
    "view": lambda t: t.view(-1)[7:].mul_(3),
    "transposed": lambda t: t.t().copy_(torch.ones(100, 300)),
    "out": lambda t: torch.add(VALUES, 1, out=t),
    "alias": lambda t: t.detach().neg_(),
    "data": lambda t: t.data.neg_(),
    "array": lambda t: t.untyped_storage().fill_(0),
    "foreach": lambda t: torch._foreach_mul_([t], 2.0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changes_are_kept(reader: Reader, stored: StoredTensor, what: str) -> None:
    expected = VALUES.clone()
    with torch.no_grad():
        CHANGES[what](expected)
        CHANGES[what](stored)
    assert not torch.equal(expected, VALUES)
    before = reader.bytes_read
    assert torch.equal(stored.full(), expected)
    part = torch.empty(2, 3)
    stored.fill([(Box((4, 5), (2, 3)), part)])
    assert torch.equal(part, expected[4:6, 5:8])
    assert torch.equal(stored.detach() + 0, expected)
    assert reader.bytes_read == before, "what is kept is not read again"
    assert torch.equal(load(reader.folder.url)["w"].full(), VALUES), "files stay what they are"


def test_assigning_the_result_of_a_change(stored: StoredTensor) -> None:
    state = {"w": stored}
    state["w"] *= 2
    assert torch.equal(state["w"], VALUES * 2)


@pytest.mark.parametrize("change", [lambda t: t.unsqueeze_(0), lambda t: t.t_(), lambda t: t.squeeze_()])
def test_its_shape_cannot_be_changed_in_place(stored: StoredTensor, change: Any) -> None:
    with pytest.raises(RuntimeError, match="Expected the shape of a checkpoint's tensor to stay"):
        change(stored)
    assert torch.equal(stored.full(), VALUES)


def test_parts_are_read_by_chunks_and_converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shard_module, "CHUNK_BYTES", 4000)  # ten rows
    save(tmp_path / "it", {"w": VALUES})
    reader = Reader(tmp_path / "it")
    stored = reader.tensors()["w",]
    assert len(stored.boxes) == 30
    targets = [(Box((9, 3), (1, 5)), torch.empty(1, 5)), (Box((4, 0), (2, 100)), torch.empty(2, 100).double())]
    stored.fill(targets)
    assert torch.equal(targets[0][1], VALUES[9:10, 3:8])
    assert torch.equal(targets[1][1], VALUES[4:6].double())
    first = length(reader, "w") / 30
    assert reader.bytes_read == pytest.approx(first, rel=0.01), "both are in the first chunk, which is read once"
    stored.fill([(Box((9, 0), (2, 1)), torch.empty(2, 1))])
    assert reader.bytes_read == pytest.approx(3 * first, rel=0.01)
    stored.fill([])
    assert reader.bytes_read == pytest.approx(3 * first, rel=0.01)


def test_torch_save_makes_ordinary_tensors_and_what_was_one_stays_one(stored: StoredTensor) -> None:
    buffer = io.BytesIO()
    torch.save({"a": stored, "b": stored}, buffer)
    buffer.seek(0)
    found = torch.load(buffer, weights_only=True)
    assert type(found["a"]) is Tensor
    assert torch.equal(found["a"], VALUES)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    copied = copy.deepcopy([stored, stored])
    assert copied[0] is copied[1]


def test_a_plain_module_loads_it(reader: Reader, stored: StoredTensor) -> None:
    module = nn.Linear(100, 300, bias=False)
    module.load_state_dict({"weight": stored})
    assert torch.equal(module.weight.detach(), VALUES)
    assert reader.bytes_read == length(reader, "w")


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8, torch.uint16],
)
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(200, 400).to(dtype)
    save(tmp_path / "it", {"w": values})
    stored = load(tmp_path / "it")["w"]
    assert isinstance(stored, StoredTensor)
    assert stored.dtype == dtype
    assert torch.equal(stored.full().view(torch.uint8), values.view(torch.uint8))


def test_tensors_that_are_no_plain_memory(tmp_path: Path) -> None:
    whole = torch.randn(200, 300, dtype=torch.complex128)
    nest = {
        "conjugate": whole.conj(),
        "view": whole[1:, ::3],
        "expanded": torch.ones(1, 1).expand(200, 300),
        "sparse": torch.eye(300).to_sparse(),
        "meta": torch.empty(200, 300, device="meta"),
    }
    save(tmp_path / "it", nest)
    found = load(tmp_path / "it")
    assert torch.equal(found["conjugate"].full(), whole.conj())
    assert torch.equal(found["view"].full(), whole[1:, ::3])
    assert torch.equal(found["expanded"].full(), torch.ones(200, 300))
    assert torch.equal(found["sparse"].to_dense(), torch.eye(300))
    assert found["meta"].is_meta
    stored_bytes = (tmp_path / "it/__0_0.distcp").stat().st_size
    plain = sum(nest[name].numel() * nest[name].element_size() for name in ("conjugate", "view", "expanded"))
    assert stored_bytes < plain + 3 * 4096, "no more memory than a view's own is written"
