import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_accel.core.absent import arrive, depart
from lightning_accel.core.structure import Structure, is_compiled


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


def test_names(structure):
    assert list(structure.names.values()) == ["a.weight", "a.bias", "b.bias"]


def test_an_unchanged_model_passes(model, structure):
    structure.require_unchanged(views(model))


def test_values_changed_in_place_pass(model, structure):
    held = views(model)
    model.load_state_dict(Model().state_dict())
    structure.require_unchanged(held)


CHANGES = {
    "c.weight": lambda m: setattr(m, "c", nn.Linear(1, 1)),
    "b.extra": lambda m: setattr(m.b, "extra", nn.Parameter(torch.zeros(1))),
    "a.bias": lambda m: setattr(m.a, "bias", nn.Parameter(torch.zeros(2))),
    "b.weight": lambda m: setattr(m, "b", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_new_trainable_parameters_are_refused_by_name(model, structure, name):
    held = views(model)
    CHANGES[name](model)
    with pytest.raises(RuntimeError, match=f"'{name}' was added, or replaced.*before the model is set up"):
        structure.require_unchanged(held)


ALLOWED = [
    lambda m: setattr(m, "loss", nn.MSELoss()),
    lambda m: setattr(m, "teacher", nn.Linear(3, 3).requires_grad_(False)),
    lambda m: setattr(m, "b", nn.Identity()),
    lambda m: prune.l1_unstructured(m.a, "bias", 1),  # the parameter goes on under another name
]


@pytest.mark.parametrize("change", ALLOWED)
def test_what_is_not_trained_may_come_and_go(model, structure, change):
    held = views(model)
    change(model)
    structure.require_unchanged(held)


def test_memory_that_was_exchanged_is_taken_back_with_its_values(model, structure):
    held = views(model)
    model.a.bias.data = torch.tensor([5.0, 6.0])
    structure.require_unchanged(held)
    assert model.a.bias.data_ptr() == held[model.a.bias].data_ptr()
    assert model.a.bias.tolist() == [5.0, 6.0]


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: setattr(m.a.bias, "data", torch.zeros(3))])
def test_memory_of_another_kind_is_refused(model, structure, move):
    held = views(model)
    move(model)
    with pytest.raises(RuntimeError, match=r"'a\.(weight|bias)' to stay torch.float32"):
        structure.require_unchanged(held)


def test_parameters_that_are_away_are_not_waited_for(model, structure):
    held = views(model)
    depart(model.a.bias, "a.bias", lambda: pytest.fail("waited"))
    structure.require_unchanged(held)
    arrive(model.a.bias)


def test_what_counts_as_compiled():
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert not is_compiled(plain)
    assert is_compiled(nn.Sequential(torch.jit.script(nn.Linear(2, 2))))
    assert is_compiled(nn.Sequential(torch.compile(nn.Linear(2, 2))))
    plain[0].compile()
    assert is_compiled(plain)
