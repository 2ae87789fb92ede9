import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_accel.core.access import Access, WaitingParameters


class Gather:
    """Stands for parameters that arrive when they are waited for."""

    def __init__(self, access, *modules):
        self.access, self.modules, self.waits = access, modules, 0
        access.close(modules, self.wait)

    def wait(self):
        self.waits += 1
        self.access.open(self.modules, self.wait)


READERS = [
    lambda m: m.weight,
    lambda m: m(torch.zeros(1, 2)),
    lambda m: list(m.parameters()),
    lambda m: dict(m.named_parameters()),
    lambda m: m.state_dict(),
    lambda m: copy.deepcopy(m),
    lambda m: pickle.dumps(m),
    lambda m: m.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)}),
    lambda m: m.to(torch.float64),
    lambda m: m.zero_grad(),
    lambda m: m.requires_grad_(False),
    lambda m: m._parameters.get("weight"),
    lambda m: list(m._parameters),
    lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(2, 2))),
    lambda m: delattr(m, "bias"),
]


@pytest.mark.parametrize("read", READERS)
def test_whoever_touches_a_parameter_waits_once_and_the_plain_dict_is_back(read):
    module = nn.Linear(2, 2)
    plain = module._parameters
    gather = Gather(Access(), module)
    assert isinstance(module._parameters, WaitingParameters)
    read(module)
    assert gather.waits == 1
    assert module._parameters is plain
    read(module) if hasattr(module, "bias") else None
    assert gather.waits == 1


def test_a_copy_has_plain_parameters():
    module = nn.Linear(2, 2)
    Gather(Access(), module)
    assert type(copy.deepcopy(module)._parameters) is dict


def test_a_module_with_parameters_of_two_gathers_waits_for_both():
    access, module, other = Access(), nn.Linear(2, 2), nn.Linear(2, 2)
    first, second = Gather(access, module), Gather(access, module, other)
    plain = other._parameters.plain
    _ = module.weight
    assert (first.waits, second.waits) == (1, 1)
    assert other._parameters is plain


def test_waiting_by_other_means_opens_as_well():
    module = nn.Linear(2, 2)
    gather = Gather(Access(), module)
    gather.wait()
    _ = module.weight
    assert gather.waits == 1


def test_open_all_does_not_wait():
    access, module = Access(), nn.Linear(2, 2)
    gather = Gather(access, module)
    access.open_all()
    _ = module.weight
    assert gather.waits == 0
