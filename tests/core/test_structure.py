import pytest
import torch
from torch import nn

from lightning_accel.core.structure import Structure


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.Linear(2, 2)
        self.b.weight = self.a.weight


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def structure(model):
    return Structure(model)


def views(model):
    return {p: p.detach() for p in model.parameters()}


def test_names_and_holders(model, structure):
    assert list(structure.names.values()) == ["a.weight", "a.bias", "b.bias"]
    assert structure.holders(model.a.weight) == [model.a, model.b]


def test_an_unchanged_model_passes(model, structure):
    structure.require_unchanged(views(model))


def test_values_changed_in_place_pass(model, structure):
    held = views(model)
    model.load_state_dict(Model().state_dict())
    structure.require_unchanged(held)


def test_an_added_parameter(model, structure):
    model.b.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"added to or removed from b\. .*before the model is set up"):
        structure.require_unchanged({})


def test_an_added_module(model, structure):
    model.c = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="from the model itself"):
        structure.require_unchanged({})


def test_a_replaced_parameter(model, structure):
    model.a.bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"'a\.bias' was replaced by another object"):
        structure.require_unchanged({})


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: setattr(m.a.bias, "data", torch.zeros(2))])
def test_moved_memory(model, structure, move):
    held = views(model)
    move(model)
    with pytest.raises(RuntimeError, match=r"'a\.(weight|bias)' to keep its memory"):
        structure.require_unchanged(held)
