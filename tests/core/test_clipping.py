import contextlib
import math

import pytest
import torch

from lightning_accel.core.clipping import Gradients, clip_grad_norm, clip_grad_value, grad_norm


class Alone:
    rank, ranks, device = 0, 1, torch.device("cpu")

    def sum_scalar(self, value, *, maximum=False):
        return value


def gradients():
    torch.manual_seed(0)
    return [torch.randn(5), torch.randn(7)]


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, math.inf])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_norm_is_that_of_one_long_vector(p, sharded):
    found = grad_norm(Gradients(gradients()), p, sharded, Alone())
    # Summation order differs: a few units in the last place of fp32.
    torch.testing.assert_close(found, torch.linalg.vector_norm(torch.cat(gradients()), p), rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_the_norm_of_many_elements_is_precise(p):
    torch.manual_seed(0)
    many = torch.randn(5_000_000)
    found = grad_norm(Gradients([many]), p, False, Alone())
    # Chunks of 2**16 elements were seen to be off by 1.5e-7 together; one of 5M at once is by 1e-4 and more.
    torch.testing.assert_close(found.double(), torch.linalg.vector_norm(many.double(), p), rtol=2e-6, atol=0)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_it_clips_as_torch_does(max_norm):
    ours, theirs = gradients(), [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients()]
    for parameter, gradient in zip(theirs, gradients(), strict=True):
        parameter.grad = gradient
    norm = clip_grad_norm(Gradients(ours), max_norm, 2.0, False, False, Alone())
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert torch.equal(norm, expected)
    assert all(torch.equal(o, t.grad) for o, t in zip(ours, theirs, strict=True))


def test_a_norm_that_is_not_finite_can_be_an_error_and_changes_nothing():
    ours = [torch.tensor([1.0, math.inf])]
    with pytest.raises(RuntimeError, match="norm of order 2.0 of the gradients is inf"):
        clip_grad_norm(Gradients(ours), 1.0, 2.0, True, False, Alone())
    assert ours[0].tolist() == [1.0, math.inf]


def test_no_gradients_have_norm_zero():
    assert clip_grad_norm(Gradients([]), 1.0, 2.0, True, True, Alone()).item() == 0.0
    assert grad_norm(Gradients([]), 2.0, False, Alone()).item() == 0.0


def test_bad_limits():
    for limit in (-1.0, 0.0, math.nan):
        with pytest.raises(ValueError, match=f"max_norm > 0 .* got {limit}"):
            clip_grad_norm(Gradients(gradients()), limit, 2.0, False, False, Alone())
        with pytest.raises(ValueError, match=f"clip_value > 0, got {limit}"):
            clip_grad_value(Gradients(gradients()), limit)
    with pytest.raises(ValueError, match="norm_type > 0"):
        clip_grad_norm(Gradients(gradients()), 1.0, 0.0, False, False, Alone())


def test_by_value():
    ours = gradients()
    clip_grad_value(Gradients(ours), 0.25)
    assert torch.equal(torch.cat(ours), torch.cat(gradients()).clamp(-0.25, 0.25))
    clip_grad_value(Gradients([]), 0.25)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_norm_that_is_not_finite_makes_no_nan(bad, skipped, sharded):
    ours = [torch.tensor([1.0, bad]), torch.tensor([2.0])]
    with contextlib.nullcontext() if skipped else pytest.warns(UserWarning, match="were set to zero"):
        norm = clip_grad_norm(Gradients(ours), 1.0, 2.0, False, sharded, Alone(), skipped=skipped)
    assert not torch.isfinite(norm)
    assert ours[0].tolist() == (pytest.approx([1.0, bad], nan_ok=True) if skipped else [0.0, 0.0])
    assert ours[1].tolist() == ([2.0] if skipped else [0.0])


@pytest.mark.parametrize("p", [2.0, 3.0, math.inf])
@pytest.mark.parametrize("sharded", [False, True])
def test_finite_gradients_whose_powers_overflow_are_clipped(p, sharded):
    ours = [torch.tensor([3e30, 0.0]), torch.tensor([4e30])]
    norm = clip_grad_norm(Gradients(ours), 1.0, p, True, sharded, Alone())
    # Rounding of fp32 once for the norm and once for each product.
    expected = torch.linalg.vector_norm(torch.tensor([3.0, 4.0]), p) * 1e30
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(ours), torch.tensor([3e30, 0.0, 4e30]) / expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_norms_of_other_dtypes_are_in_fp32(dtype, p):
    torch.manual_seed(0)
    ours = [torch.randn(1000, dtype=dtype), torch.randn(7, dtype=torch.float32)]
    expected = torch.tensor([torch.linalg.vector_norm(g.to(torch.complex128), p) for g in ours]).norm(p)
    norm = clip_grad_norm(Gradients(ours), 1.0, p, True, False, Alone())
    assert norm.dtype is torch.float32
    torch.testing.assert_close(norm.double(), expected, rtol=2e-6, atol=0)
    clipped = torch.tensor([torch.linalg.vector_norm(g.to(torch.complex128), p) for g in ours]).norm(p)
    # Each product is rounded, to 8 bits at worst.
    torch.testing.assert_close(clipped, torch.ones_like(clipped), rtol=2**-8, atol=0)
