import pytest
import torch

from lightning_accel.core.memory import keep_freed_memory, zeros


@pytest.mark.parametrize("numel", [0, 1, 1000, 3_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_zeros_are_zero_writable_and_of_the_asked_size(numel, dtype):
    tensor = zeros(numel, dtype, torch.device("cpu"))
    assert tensor.shape == (numel,)
    assert tensor.dtype is dtype
    assert not tensor.any()
    tensor.fill_(1)
    assert int(tensor.real.sum() if tensor.is_complex() else tensor.float().sum(dtype=torch.float64)) == numel


def test_large_buffers_start_at_a_huge_page():
    assert zeros(3_000_001, torch.float32, torch.device("cpu")).data_ptr() % 2**21 == 0


def test_the_memory_stays_while_a_view_of_it_does():
    view = zeros(3_000_000, torch.float32, torch.device("cpu"))[5:10]
    view += 1
    assert view.tolist() == [1.0] * 5


def test_keeping_freed_memory_can_be_asked_for_any_number_of_times():
    keep_freed_memory()
    keep_freed_memory()
