"""Where the parts of a model are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_accel.inference import infer_device_map
from lightning_accel.inference.places import check_device_map, place_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 10, bias=False)  # 400 bytes
        self.second = nn.Linear(10, 10, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(10, 10, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(10, 10, bias=False)


def test_places_are_filled_one_after_another() -> None:
    assert infer_device_map(Model(), {"cpu": 10_000}) == {"": "cpu"}
    assert infer_device_map(Model(), {"cpu": 1_300}) == {
        "embedding": "cpu",
        "blocks.0": "cpu",
        "blocks.1": "disk",
        "blocks.2": "disk",
        "head": "disk",
    }


def test_a_block_is_divided_unless_that_is_forbidden() -> None:
    divided = infer_device_map(Model(), {"cpu": 1_700})
    assert divided["blocks.1.first"] == "cpu"
    assert divided["blocks.1.second"] == "disk"
    whole = infer_device_map(Model(), {"cpu": 1_700}, no_split_module_classes=["Block"])
    assert whole["blocks.1"] == "disk"
    assert infer_device_map(Model(), {"cpu": 1_700}, no_split_module_classes=[Block]) == whole


def test_a_device_keeps_room_for_what_comes_from_elsewhere() -> None:
    # 1,700 bytes take 4 of 8 layers; one of them stays free for the layers that are lent.
    found = infer_device_map(Model(), {0: 1_700, "cpu": 800})
    assert {name: str(place) for name, place in found.items()} == {
        "embedding": "cuda:0",
        "blocks.0": "cuda:0",
        "blocks.1": "cpu",
        "blocks.2": "disk",
        "head": "disk",
    }


def test_the_dtype_counts() -> None:
    assert infer_device_map(Model(), {"cpu": 1_600}, dtype=torch.bfloat16) == {"": "cpu"}


def test_tied_weights_count_once() -> None:
    model = Model()
    model.head.weight = model.embedding.weight
    assert infer_device_map(model, {"cpu": 2_800}) == {"": "cpu"}


def test_the_innermost_module_that_is_named_says_where() -> None:
    places = {"": "cpu", "blocks.1": "disk"}
    assert place_of("blocks.1.first.weight", places) == "disk"
    assert place_of("blocks.10.first.weight", places) == "cpu"
    assert place_of("head.weight", {"blocks": "cpu"}) is None


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": "cpu", "block": "disk"}, r"name modules of the Model, got \['block'\]"),
        ({"blocks": "cpu"}, "no place for embedding.weight, head.weight"),
        ({"": "dsik"}, "or 'disk', got 'dsik'"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(device_map: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_device_map(Model(), device_map)


def test_a_limit_for_the_disk_is_refused() -> None:
    with pytest.raises(ValueError, match="not take is on 'disk'"):
        infer_device_map(Model(), {"cpu": "1GB", "disk": "1GB"})
