"""Parameters whose values are away let through what needs none, wait for the rest, or refuse it."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from lightning_accel.core.absent import AbsentParameter, arrive, depart


class Gather:
    """Stands for parameters that arrive when they are waited for."""

    def __init__(self, *parameters):
        self.parameters, self.waits = parameters, 0
        for number, parameter in enumerate(parameters):
            depart(parameter, f"p{number}", self.wait)

    def wait(self):
        self.waits += 1
        for parameter in self.parameters:
            arrive(parameter)


READERS = [
    lambda m, held: m(torch.zeros(1, 2)),
    lambda m, held: held.sum(),
    lambda m, held: held + 1,
    lambda m, held: held.data,
    lambda m, held: held.detach(),
    lambda m, held: held.T,
    lambda m, held: held[0],
    lambda m, held: held.data_ptr(),
    lambda m, held: held.untyped_storage(),
    lambda m, held: held.tolist(),
    lambda m, held: held.numpy(force=True),
    lambda m, held: torch._foreach_add([held], 1),
    lambda m, held: torch.nn.utils.parameters_to_vector([held]),
    lambda m, held: held.copy_(held) if not held.requires_grad_(False).requires_grad else None,
    lambda m, held: m.state_dict(),
    lambda m, held: copy.deepcopy(m),
    lambda m, held: copy.copy(held).sum(),
    lambda m, held: pickle.dumps(m),
    lambda m, held: m.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)}),
    lambda m, held: m.to(torch.float64),
    lambda m, held: torch.save(held, "/dev/null"),
]


@pytest.mark.parametrize("read", READERS)
def test_whoever_needs_values_waits_once(read):
    module = nn.Linear(2, 2)
    gather = Gather(module.weight, module.bias)
    read(module, module.weight)
    assert gather.waits == 1
    assert type(module.weight) is type(module.bias) is nn.Parameter
    read(module, module.weight)
    assert gather.waits == 1


def test_recurrent_layers_keep_a_list_of_their_parameters():
    module = nn.LSTM(2, 3, num_layers=2)
    expected = module(torch.ones(4, 1, 2))[0]
    gather = Gather(*module.parameters())
    assert torch.equal(module(torch.ones(4, 1, 2))[0], expected)
    assert gather.waits == 1


def test_parameters_of_two_gathers_in_one_call():
    module = nn.Linear(2, 2)
    first, second = Gather(module.weight), Gather(module.bias)
    module(torch.zeros(1, 2))
    assert (first.waits, second.waits) == (1, 1)


@pytest.mark.parametrize("wait", [None, lambda: pytest.fail("waited")])
def test_what_needs_no_values_goes_through(wait):
    module = nn.Linear(3, 2)
    weight = module.weight
    depart(weight, "weight", wait)
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.numel(), weight.dim(), weight.dtype) == ((2, 3), 6, 2, torch.float32)
    assert weight.device.type == "cpu"
    assert weight in {weight: 1}
    assert "AbsentParameter(name='weight', shape=(2, 3)" in repr(weight)
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.zero_grad()
    weight.grad = torch.zeros(2, 3)
    optimizer.zero_grad()
    assert weight.grad is None
    weight.requires_grad_(False)
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    module.eval().requires_grad_(True)
    arrive(weight)


REFUSED = [read for read in READERS if read is not READERS[13]]  # that one is about requires_grad as well


@pytest.mark.parametrize("read", REFUSED)
def test_values_that_rest_sharded_are_refused_by_name(read):
    module = nn.Linear(2, 2)
    depart(module.weight, "head.weight")
    with pytest.raises(RuntimeError, match=r"'head\.weight' to be needed within forward only.*full_parameters"):
        read(module, module.weight)
    assert isinstance(module.weight, AbsentParameter)


def test_a_copy_is_a_plain_parameter_and_nothing_is_left_behind():
    module = nn.Linear(2, 2)
    Gather(*module.parameters())
    assert type(copy.deepcopy(module).weight) is nn.Parameter
    assert vars(module.weight) == {}
    restored = pickle.loads(pickle.dumps(module))
    assert type(restored.weight) is nn.Parameter


def test_a_subclass_is_itself_again():
    class Special(nn.Parameter):
        pass

    parameter = Special(torch.ones(2))
    depart(parameter, "special")
    arrive(parameter)
    assert type(parameter) is Special
    gc.collect()
