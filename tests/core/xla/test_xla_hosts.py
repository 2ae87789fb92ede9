"""What hosts tell each other, by two gloo processes without XLA; and what is placed where, on faked hosts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness import Ranks
from lightning_accel.core.xla.hosts import Hosts, join


def joined() -> Hosts:
    return join(dist.get_world_size(), dist.get_rank())


def told() -> dict[str, Any]:
    hosts = joined()
    hosts.barrier()
    number = torch.tensor([1, 4]) * (hosts.index + 1)
    return {
        "gathered": hosts.gather(("host", hosts.index)),
        "from 1": hosts.broadcast({"index": hosts.index}, 1),
        **{name: hosts.reduce(number, name).tolist() for name in ("mean", "AVG", "sum", "min", "max")},
        "devices": hosts.order_of_devices([5, 2] if hosts.index else [0, 7]),
    }


def test_what_hosts_tell_each_other(ranks2: Ranks) -> None:
    expected = {
        "gathered": [("host", 0), ("host", 1)],
        "from 1": {"index": 1},
        "mean": [1.5, 6.0],
        "AVG": [1.5, 6.0],
        "sum": [3, 12],
        "min": [1, 4],
        "max": [2, 8],
        "devices": [0, 7, 5, 2],
    }
    assert ranks2.run(told) == [expected, expected]


def differing_devices() -> None:
    hosts = joined()
    hosts.order_of_devices(range(4 - hosts.index))


def test_hosts_with_other_numbers_of_devices_are_refused(ranks2: Ranks) -> None:
    expected = ("ValueError", "Expected as many XLA devices on every host, got [4, 3] by host.")
    for kind, message in filter(None, ranks2.run_expecting_error(differing_devices)):
        assert (kind, message[: len(expected[1])]) == expected


def first_values() -> tuple[Tensor, Tensor]:
    hosts = joined()
    torch.manual_seed(hosts.index)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module[1].running_mean.fill_(hosts.index)
    hosts.take_first_values(module)
    return module[0].weight.detach(), module[1].running_mean


def test_host_0s_values_are_those_of_all(ranks2: Ranks) -> None:
    (weight, mean), other = ranks2.run(first_values)
    torch.manual_seed(0)
    assert torch.equal(weight, nn.Linear(3, 2).weight)
    assert torch.equal(weight, other[0])
    assert torch.equal(mean, torch.zeros(2))
    assert torch.equal(mean, other[1])


def other_models() -> None:
    hosts = joined()
    hosts.take_first_values(nn.Linear(3, 2 + hosts.index))


def test_other_models_are_refused(ranks2: Ranks) -> None:
    for kind, message in filter(None, ranks2.run_expecting_error(other_models)):
        assert kind == "ValueError"
        assert "Expected the same model on every rank" in message


def failing_on_1() -> None:
    hosts = joined()

    def write() -> None:
        if hosts.index == 1:
            raise OSError("no room")

    hosts.unanimous("saving", write)


def test_what_fails_on_one_host_fails_on_all(ranks2: Ranks) -> None:
    (_, first), (_, second) = filter(None, ranks2.run_expecting_error(failing_on_1))
    assert first == "rank 1 has failed in saving: no room"
    assert second == "no room"


def wrong_rank() -> None:
    join(2, 1 - dist.get_rank())


def test_a_group_with_other_ranks_is_refused(ranks2: Ranks) -> None:
    first, _ = ranks2.run_expecting_error(wrong_rank)
    assert first is not None
    assert "on gloo, and this to be rank 1 of 2, got rank 0 of 2 on gloo" in first[1]


def test_one_host_needs_nobody() -> None:
    assert not dist.is_initialized()
    hosts = join(1, 0)
    value = torch.ones(2)
    assert hosts == Hosts()
    assert hosts.reduce(value) is value
    assert hosts.gather(3) == [3]
    assert hosts.broadcast(value, 0) is value
    hosts.barrier()
    assert not dist.is_initialized()


def test_other_reductions_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected reduce_op to be one of 'mean', 'sum', 'min', 'max', got 'product'"):
        Hosts(2, 0).reduce(torch.ones(1), "product")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hosts as the runtime says, found anew."""
    from torch_xla import runtime

    from lightning_accel.core.xla import hosts

    hosts._found.cache_clear()
    monkeypatch.setattr(runtime, "process_count", lambda: 2)
    monkeypatch.setattr(runtime, "process_index", lambda: 1)
    monkeypatch.setattr(hosts, "join", Hosts)
    yield hosts.hosts
    hosts._found.cache_clear()


@pytest.mark.xla
def test_several_hosts_are_warned_of_once(found: Any, recwarn: pytest.WarningsRecorder) -> None:
    assert found() == found() == Hosts(2, 1)
    (warning,) = [str(w.message) for w in recwarn if "several hosts" in str(w.message)]
    assert warning.startswith("accel_xla has not been run on several hosts by its authors")


class Other(Hosts):
    """One of two hosts, where the other says what this one does, but for its devices."""

    def gather(self, value: Any) -> list[Any]:
        return [[2, 0], [3, 1]] if isinstance(value, list) else [value] * self.count


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_accel.core.xla.hosts._found", lambda: Other(2, 0))


@pytest.mark.xla
def test_a_share_is_placed_as_part_of_the_global_batch(two_hosts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_xla.core import xla_model

    from lightning_accel.core.xla.placing import Placing

    sent: list[Any] = []

    def send(tensor: Tensor, device: Any, sharding: Any) -> list[Tensor]:
        sent.append((tensor, sharding))
        return [tensor]

    monkeypatch.setattr(xla_model, "send_cpu_data_to_device", send)
    placing = Placing()
    placing.put_batch((torch.zeros(6, 3), torch.zeros(6)))
    (_, first), (_, second) = sent
    assert first.minibatch
    assert second.minibatch
    assert first.mesh.device_ids.tolist() == [2, 0, 3, 1], "host by host"
    assert first.partition_spec == (("replicate", "shard"), None)
    assert second.partition_spec == (("replicate", "shard"),)
    with pytest.raises(ValueError, match=r"multiple of the 2 XLA devices of this host, got a tensor of shape \(5, 3\)"):
        placing.put_batch(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"samples in their first dimension, got a scalar \(torch.float32\)"):
        placing.put_batch(torch.tensor(1.0))


@pytest.mark.xla
def test_what_torch_xla_deals_to_its_devices_is_the_batch(two_hosts: None) -> None:
    """All devices are of one process here, so its share is the whole batch, and in the order of its devices."""
    from lightning_accel.core.xla.moving import to_host
    from lightning_accel.core.xla.placing import Placing

    batch = torch.arange(16.0).view(8, 2)
    (placed,) = to_host([Placing().put_batch(batch)])
    order = [2, 0, 3, 1]  # the devices' places in the batch; each was dealt the samples of its own number
    assert torch.equal(placed.view(4, 2, 2), batch.view(4, 2, 2)[order])


@pytest.mark.xla
def test_parts_on_several_hosts_are_put_together_by_xla(two_hosts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_accel.core.xla import moving
    from lightning_accel.core.xla.placing import Placing
    from lightning_accel.core.xla.shardings import sharded

    def put_together(tensor: Tensor) -> Tensor:
        raise AssertionError("parts are on other hosts")

    placing = Placing(2)
    values = torch.arange(35.0).view(7, 5)
    monkeypatch.setattr(moving, "_put_together", put_together)
    (found,) = moving.to_host([placing.put(values, sharded(values.shape, 2))])
    assert torch.equal(found, values)
