"""accel_xla on several hosts, which are faked: one process says to be one of two, and hears from the other itself.

Its devices have what it is dealt as if that were all. Nothing here has run on several hosts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning_utilities.core.rank_zero import rank_zero_only
from litnet import LitNet, Losses, leave_group, litnet, loader, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_accel.core.xla.hosts import Hosts
from lightning_accel.strategies import AccelXLAStrategy
from lightning_accel.strategies import fabric as accel_fabric
from lightning_accel.strategies.xla_shared import put_samples


class Faked(Hosts):
    def gather(self, value: Any) -> list[Any]:
        is_devices = isinstance(value, list) and value == [0, 1, 2, 3]
        return [[0, 1], [2, 3]] if is_devices else [value] * self.count

    def broadcast(self, value: Any, source: int = 0) -> Any:
        return value

    def barrier(self) -> None: ...

    def take_first_values(self, module: nn.Module) -> None: ...


@pytest.fixture
def be(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has this process be one of two hosts."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)

    def gather(values: list[Any], value: Any) -> None:
        values[:] = [value] * len(values)

    def become(index: int) -> None:
        monkeypatch.setattr(dist, "all_gather_object", gather)
        monkeypatch.setattr("lightning_accel.core.xla.hosts._found", lambda: Faked(2, index))

    yield become
    leave_group()


Be = Callable[[int], None]


@pytest.mark.parametrize("kind", [AccelXLAStrategy, accel_fabric.AccelXLAStrategy])
def test_one_host_and_two(kind: Any, be: Be, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = kind()
    be(1)
    assert (strategy.world_size, strategy.num_nodes, strategy.is_distributed) == (2, 2, True)
    assert (strategy.global_rank, strategy.node_rank, strategy.local_rank, strategy.is_global_zero) == (1, 1, 0, False)
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": 1}
    strategy.num_nodes = 2
    with pytest.raises(ValueError, match=r"Expected num_nodes=1 with accel_xla on 2 host\(s\), got 3"):
        strategy.num_nodes = 3
    assert strategy.all_gather(torch.tensor([3])).tolist() == [[3], [3]]
    monkeypatch.setattr(Faked, "gather", lambda self, value: [value, not value])
    assert strategy.reduce_boolean_decision(True, all=False)
    assert not strategy.reduce_boolean_decision(True)
    monkeypatch.setattr("lightning_accel.core.xla.hosts._found", Hosts)
    assert (strategy.world_size, strategy.num_nodes, strategy.is_distributed) == (1, 1, False)
    # The Trainer's goes on in the middle of an order that distributed samplers had, on one host too.
    alone = {"num_replicas": 1, "rank": 0} if kind is AccelXLAStrategy else None
    assert strategy.distributed_sampler_kwargs == alone
    assert strategy.all_gather(torch.tensor([3])).tolist() == [3]


def test_the_mean_over_hosts_is_of_what_is_in_host_memory(be: Be, monkeypatch: pytest.MonkeyPatch) -> None:
    be(0)
    monkeypatch.setattr(Faked, "gather", lambda self, value: [value, 3 * value])
    assert AccelXLAStrategy().reduce(torch.tensor(1), reduce_op="mean") == 2.0
    assert AccelXLAStrategy().reduce(torch.tensor(1), reduce_op="sum") == 4
    assert accel_fabric.AccelXLAStrategy().all_reduce(torch.tensor([1]), reduce_op="mean").tolist() == [2.0]


def test_what_moves_itself_is_refused(be: Be) -> None:
    class Moving:
        def to(self, device: Any) -> Any:
            raise AssertionError("not on several hosts")

    be(0)
    with pytest.raises(TypeError, match="on several hosts, got a Moving that moves itself"):
        put_samples([Moving()], lambda tensor: tensor, torch.device("cpu"))


def group_of_one() -> None:
    """For what Lightning and its signals ask of torch.distributed directly."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)


class Noting(LitNet):
    """Notes how it is dealt its data, and what the progress bar shows."""

    def on_train_start(self) -> None:
        sampler: Any = self.trainer.train_dataloader.sampler  # type: ignore[union-attr]
        assert isinstance(sampler, DistributedSampler)
        self.dealt = sampler.num_replicas, sampler.rank, sampler.shuffle

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.shown = self.trainer.progress_bar_callback.get_metrics(self.trainer, self)  # type: ignore[union-attr]
        self.size = len(batch[0])


@pytest.mark.xla
@pytest.mark.parametrize("index", [0, 1])
def test_a_fit_of_one_of_two_hosts(index: int, be: Be, tmp_path: Path) -> None:
    be(index)
    group_of_one()
    torch.manual_seed(0)
    model, bar, losses = Noting(), TQDMProgressBar(), Losses()
    settings = {"max_epochs": 2, "callbacks": [bar, losses], "enable_progress_bar": True, "gradient_clip_val": 0.3}
    fit = trainer(AccelXLAStrategy("zero2"), tmp_path, **settings)
    assert fit.world_size == fit.num_nodes == 2
    fit.fit(model, loader(4, shuffle=True), loader(2, seed=2))
    assert model.dealt == (2, index, True)
    assert model.shown == {}
    assert model.size == 16
    assert len(losses.values) == 2 * 2, "half of the batches"
    assert rank_zero_only.rank == index
    written = [name for _, _, names in os.walk(tmp_path) for name in names]
    assert bool(written) is (index == 0)
    assert "get_metrics" not in vars(bar)
    assert model.accuracy.distributed_available_fn() is False
    fit.test(model, loader(2), verbose=True)


@pytest.mark.xla
def test_samples_to_predict_that_do_not_divide_are_refused(be: Be) -> None:
    be(0)
    group_of_one()
    data = TensorDataset(torch.zeros(7, 5, dtype=torch.int64), torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match="samples to predict that 2 hosts divide evenly, got 7"):
        trainer("accel_xla").predict(litnet(), DataLoader(data, batch_size=4))
    assert len(torch.cat(trainer("accel_xla").predict(litnet(), loader(2)))) == 16  # type: ignore[arg-type]


@pytest.mark.xla
def test_a_transfer_of_ones_own_is_refused(be: Be) -> None:
    class Moved(LitNet):
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            raise AssertionError("not on several hosts")

    be(0)
    group_of_one()
    with pytest.raises(TypeError, match="no transfer_batch_to_device of the model's or the data's own on several"):
        trainer("accel_xla", max_steps=1).fit(Moved(), loader(2))


@pytest.mark.xla
@pytest.mark.parametrize("index", [0, 1])
def test_fabric_on_one_of_two_hosts(index: int, be: Be, tmp_path: Path) -> None:
    be(index)
    fabric = Fabric(strategy="accel_xla")
    fabric.launch()
    assert (fabric.world_size, fabric.global_rank, fabric.is_global_zero) == (2, index, index == 0)
    assert rank_zero_only.rank == index
    model = litnet()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer = fabric.setup(model, optimizer)
    data: Any = fabric.setup_dataloaders(loader(4))
    assert data.sampler.num_replicas == 2
    batches = 0
    for batch in data:
        loss: Tensor = nn.functional.cross_entropy(model(batch[0]), batch[1])
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        batches += 1
    assert batches == 2
    fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    assert (tmp_path / "state.ckpt").exists() is (index == 0)
    fabric.strategy.teardown()


def test_the_signals_of_a_stage_are_given_back(be: Be) -> None:
    from lightning_accel.strategies.xla_hosts import AmongHosts

    fit = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    before = dict(vars(fit.fit_loop.epoch_loop))
    AmongHosts(fit).end()
    assert dict(vars(fit.fit_loop.epoch_loop)) == before
