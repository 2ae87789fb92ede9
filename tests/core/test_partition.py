import pytest
import torch
from torch import nn

from lightning_accel.core.partition import find_blocks, partition, trainable_parameters

MB = 2**20


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))


class Model(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(5))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(8)


def names(units):
    return {unit.name: [named.name for named in unit.members] for unit in units}


def test_blocks_are_the_members_of_the_largest_list_of_like_modules():
    assert list(find_blocks(Model(), None)) == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_model_without_repeated_blocks_has_none():
    assert find_blocks(nn.Linear(2, 2), None) == {}
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), None) == {}


def test_units_by_class_and_by_name():
    model = Model()
    assert list(find_blocks(model, [Block])) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(find_blocks(model, ["embed", "blocks.1"])) == ["embed", "blocks.1"]


def test_a_unit_that_matches_nothing_is_an_error_that_names_what_there_is():
    with pytest.raises(ValueError, match=r"'bloks' matches nothing.*Model, Embedding"):
        find_blocks(Model(), ["bloks"])
    with pytest.raises(ValueError, match="LSTM.* matches nothing"):
        find_blocks(Model(), [nn.LSTM])


def test_units_that_overlap_are_an_error():
    with pytest.raises(ValueError, match=r"'blocks.0.inner' lies within 'blocks.0'"):
        find_blocks(Model(), [Block, "blocks.0.inner"])


def test_small_units_are_joined_and_blocks_stay_whole():
    model = Model()
    block_bytes = sum(p.numel() * 4 for p in model.blocks[0].parameters())
    units = partition(trainable_parameters(model), find_blocks(model, None), cap_bytes=block_bytes)
    assert [len(unit.members) for unit in units] == [11, 4, 4, 4, 2]
    assert units[1].name == "blocks.0"
    assert all(name.startswith("blocks.1.") for name in names(units)["blocks.1"])


def test_everything_fits_into_one_unit_under_a_large_cap():
    model = Model()
    (unit,) = partition(trainable_parameters(model), find_blocks(model, None), cap_bytes=MB)
    assert len(unit.members) == len(list(model.parameters()))
    assert unit.name == "embed.weight … norm.bias"


def test_frozen_parameters_are_in_no_unit_and_tied_ones_in_one():
    model = Model()
    model.embed.requires_grad_(False)
    model.heads[1].weight = model.heads[0].weight
    found = [named.name for named in trainable_parameters(model)]
    assert "embed.weight" not in found
    assert "heads.1.weight" not in found
    assert "heads.0.weight" in found


def test_a_parameter_that_two_blocks_share_belongs_to_neither():
    model = Model()
    shared = nn.Parameter(torch.zeros(8))
    model.blocks[0].extra = shared
    model.blocks[2].extra = shared
    units = names(partition(trainable_parameters(model), find_blocks(model, None), cap_bytes=1))
    assert units["blocks.0.extra"] == ["blocks.0.extra"]
    assert "blocks.0.extra" not in units["blocks.0"]


def test_blocks_that_are_gathered_apart_are_not_joined():
    model = Model()
    groups = partition(trainable_parameters(model), find_blocks(model, None), cap_bytes=MB, join_blocks=False)
    assert [group.block for group in groups] == [None, "blocks.0", "blocks.1", "blocks.2", None]
