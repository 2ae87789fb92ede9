"""Batches as structures: taken apart, cut, joined, packed."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_accel.data.batches import (
    filled,
    joined_samples,
    map_leaves,
    outline,
    samples,
    samples_of,
    tensors_of,
    to_device,
)
from lightning_accel.data.wire import _packed, _unpacked


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Record:
    image: Tensor
    names: list[str]


class Encoding(UserDict[str, Any]):
    """As that of transformers: a mapping with something beside its items."""

    kept = "yes"


def batch(start: int = 0, size: int = 3) -> Any:
    numbers = torch.arange(start, start + size)
    return {
        "pair": Pair(numbers, [numbers.double(), (numbers > 1,)]),
        "record": Record(numbers.reshape(-1, 1).repeat(1, 2), [str(n) for n in numbers.tolist()]),
        "scale": torch.tensor(2.0),
        "note": "all",
        "encoding": Encoding(ids=numbers),
    }


def as_lists(value: Any) -> Any:
    return map_leaves(lambda leaf: leaf.tolist() if isinstance(leaf, Tensor) else leaf, value)


def test_some_samples() -> None:
    part = samples(batch(), 1, 3)
    assert as_lists(part["pair"]) == Pair([1, 2], [[1.0, 2.0], ([False, True],)])
    assert as_lists(part["record"]) == Record([[1, 1], [2, 2]], ["1", "2"])  # type: ignore[arg-type]
    assert (float(part["scale"]), part["note"]) == (2.0, "all")
    assert type(part["encoding"]) is Encoding
    assert samples_of(part) == 2


def test_joined_again() -> None:
    parts = [samples(batch(), 0, 1), samples(batch(), 1, 3), batch(3, 2)]
    assert str(as_lists(joined_samples(parts))) == str(as_lists(batch(0, 5)))


def test_texts_alone_are_samples() -> None:
    assert samples_of(["a", "b"]) == 2
    assert samples(["a", "b"], 1, 2) == ["b"]
    assert joined_samples([["a"], ["b", "c"]]) == ["a", "b", "c"]


def test_samples_that_nobody_can_tell_apart() -> None:
    with pytest.raises(ValueError, match=r"of one size in their first dimension, the samples, got \[2, 3\]"):
        samples_of([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match="got no tensor"):
        samples_of({"note": "all"})
    with pytest.raises(ValueError, match="whose samples fit together"):
        joined_samples([torch.zeros(2, 3), torch.zeros(2, 4)])


def test_a_batch_is_its_outline_and_its_bytes() -> None:
    given = {
        "pair": Pair(torch.randn(3, 5).to(torch.bfloat16), torch.tensor([True, False])),
        "wide": torch.randn(2, 3, dtype=torch.complex64).t(),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
        "text": ["a", None],
    }
    outlined, tensors = outline(given), tensors_of(given)
    assert not tensors_of(outlined)
    received = filled(outlined, _unpacked(_packed(tensors), tensors_of_outline(outlined)))
    assert str(received) == str(given)


def tensors_of_outline(outlined: Any) -> list[Any]:
    shapes: list[Any] = []
    map_leaves(lambda leaf: shapes.append(leaf) if hasattr(leaf, "dtype") else None, outlined)
    return shapes


def test_moved() -> None:
    moved = to_device(batch(), torch.device("meta"))
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert moved["record"].names == ["0", "1", "2"]
