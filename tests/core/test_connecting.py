"""Which collectives a process group gets; back ends that torch does not bring.

The third party's back end is gloo's class under a name of its own, so that there is one which works. While it is in
use, asking for one of torch's by name is an error: no code path may need it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Regression, alone, assert_close, loader, trainer, values
from torch import Tensor

from core.toys import ROW_NAMES, Net, adamw, compare
from harness import Ranks
from lightning_accel.core.checkpoint import load
from lightning_accel.core.connecting import connect
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.torch_collectives import TorchCollectives
from lightning_accel.strategies import AccelFSDPStrategy
from lightning_accel.strategies.stock import whole
from rows import everyday

EXACT = 1e-12
"""Of float64: tells a bug from rounding."""


def chosen(backend: str | None) -> tuple[bool, bool]:
    """Whether gloo's own collectives were taken for the CPU, and torch's."""
    dist.destroy_process_group()
    dist.init_process_group(backend)
    found = connect(torch.device("cpu"))
    found.close()
    return isinstance(found, GlooCollectives), isinstance(found, TorchCollectives)


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo", None])
def test_gloo_by_whatever_name_gets_its_own_collectives(ranks2: Ranks, backend: str | None) -> None:
    assert ranks2.run(chosen, backend) == [(True, False)] * 2


def by_third_party(job: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Do a job where all there is are the third party's process groups."""
    dist.destroy_process_group()
    if "third" not in dist.Backend.backend_list:
        dist.Backend.register_backend("third", dist.ProcessGroupGloo, devices=["cpu"])
    with (
        mock.patch.multiple(
            dist.distributed_c10d,
            _GLOO_AVAILABLE=False,
            _NCCL_AVAILABLE=False,
        ),
        mock.patch.dict(dist.Backend.default_device_backend_map, {"cpu": "third"}),
    ):
        with pytest.raises(RuntimeError, match="gloo|Gloo"):
            dist.init_process_group("gloo")
        dist.init_process_group("third")
        assert isinstance(connect(torch.device("cpu")), TorchCollectives)
        return job(*arguments, **options)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_every_row_runs_on_a_back_end_that_torch_does_not_bring(ranks2: Ranks, row: str) -> None:
    options = {"shard_size": 1} if row == "fsdp_hybrid" else {}
    errors = ranks2.run(by_third_party, compare, Net, row, adamw, steps=20, accumulate=2, **options)
    assert max(errors) < EXACT


def fit_and_save(folder: Path) -> dict[str, Tensor]:
    strategy = AccelFSDPStrategy(state_dict_type="sharded", async_save=True, process_group_backend="third")
    keeps = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1)
    module = Regression()
    trainer(strategy, max_epochs=2, callbacks=[keeps], enable_checkpointing=True).fit(module, loader())
    return values(module)


def test_the_trainer_trains_and_saves_on_one(ranks2: Ranks, tmp_path: Path) -> None:
    module = Regression()
    alone(max_epochs=2).fit(module, loader())
    for trained in ranks2.run(by_third_party, fit_and_save, tmp_path):
        assert_close(trained, values(module), EXACT)
        (left,) = tmp_path.iterdir()
        assert_close(whole(load(left))["state_dict"], trained, tolerance=0)
