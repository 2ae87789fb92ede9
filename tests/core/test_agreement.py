import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_accel.core.agreement import BufferVersions, synchronise


def synchronised():
    torch.manual_seed(dist.get_rank())
    module = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))
    module.register_buffer("mask", torch.rand(5) > 0.5)
    synchronise(module)
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_all_ranks_get_rank_0s_values(ranks3):
    first, *others = ranks3.run(synchronised)
    torch.manual_seed(0)
    assert torch.equal(first["0.weight"], nn.Linear(300, 300).weight)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.fixture
def module():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.register_buffer("count", torch.zeros(1))
    return module


def changed(module, versions):
    names = [name for name, _ in module.named_buffers()]
    return {name for name, flag in zip(names, versions.changed(), strict=True) if flag}


def test_buffers_that_were_written_to_or_replaced(module):
    module.eval()
    versions = BufferVersions(module)
    assert changed(module, versions) == set()
    module.count += 1
    assert changed(module, versions) == {"count"}
    versions.refresh()
    module.count = torch.zeros(1)
    assert changed(module, versions) == {"count"}


def test_statistics_of_norm_layers_count_as_changed_while_training(module):
    versions = BufferVersions(module)
    module.train()
    assert changed(module, versions) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    module.eval()
    assert changed(module, versions) == set()
