import pytest
import torch
from torch import nn

from lightning_accel.core.placeholder import ShardedGradient


@pytest.fixture
def zeroed():
    return []


@pytest.fixture
def parameter(zeroed):
    parameter = nn.Parameter(torch.randn(3, 4))
    parameter.grad = ShardedGradient(parameter, "layer.weight", lambda: zeroed.append("layer.weight"))
    return parameter


def test_it_tells_shape_dtype_and_that_there_is_a_gradient(parameter):
    assert parameter.grad is not None
    assert parameter.grad.shape == (3, 4)
    assert parameter.grad.dtype is torch.float32
    assert "layer.weight" in repr(parameter.grad)


def scaler():
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    return scaler


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.grad.norm(),
        lambda p: p.grad.mul_(2),
        lambda p: p.grad.data.clamp_(0, 1),
        lambda p: p.grad + 1,
        lambda p: p.grad[0],
        lambda p: p.grad.clone(),
        lambda p: torch.nn.utils.clip_grad_norm_([p], 1.0),
        lambda p: torch.nn.utils.clip_grad_value_([p], 1.0),
        lambda p: torch.optim.SGD([p], 0.1).step(),
        lambda p: torch.optim.AdamW([p], 0.1, fused=True).step(),
        lambda p: scaler().unscale_(torch.optim.SGD([p], 0.1)),
    ],
)
def test_any_use_of_its_values_raises_and_names_the_remedy(parameter, use):
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError, match=r"layer\.weight.*rests sharded.*clip_gradients"):
        use(parameter)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("foreach", [False, True])
def test_zeroing_reaches_the_place_where_it_rests(parameter, zeroed, foreach):
    torch.optim.SGD([parameter], 0.1, foreach=foreach).zero_grad(set_to_none=False)
    assert zeroed == ["layer.weight"]
    assert parameter.grad is not None


def test_zero_grad_removes_it(parameter, zeroed):
    torch.optim.SGD([parameter], 0.1).zero_grad()
    assert parameter.grad is None
    assert zeroed == []
