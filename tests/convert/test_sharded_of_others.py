"""Directories that torch's FSDP2 and Lightning's own strategies have written, on two ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import assert_same
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from harness import Ranks
from lightning_accel.convert import convert, inspect
from lightning_accel.core.checkpoint import load

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Blocks(nn.Module):
    """Odd sizes: the ranks' parts differ, and one has nothing of some."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Linear(9, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.blocks(inputs)


def save_fsdp2(folder: Path, layout: str) -> dict[str, Any]:
    """Train and save; returns what was saved, whole."""
    torch.manual_seed(0)
    model = Blocks()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(
        [{"params": list(model.blocks[2].parameters()), "lr": 0.1}, {"params": list(model.blocks[0].parameters())}]
    )
    for _ in range(2):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    names = {"model": "model", "optimizer": "optim"}
    if layout != "torch":
        names = {"model": layout, "optimizer": "optimizer_0"}
    parts = {
        names["model"]: get_model_state_dict(model),
        names["optimizer"]: get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(parts, checkpoint_id=folder)
    if layout != "torch" and torch.distributed.get_rank() == 0:
        rest = {"epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.5.0", "loops": {}, "lr_schedulers": []}
        torch.save(rest, folder / "meta.pt")
    return {
        "state_dict": get_model_state_dict(model, options=WHOLE),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE),
    }


@pytest.mark.parametrize("layout", ["torch", "state_dict", "model"])
def test_a_directory_of_fsdp2(ranks2: Ranks, tmp_path: Path, layout: str) -> None:
    """As torch users save it, and as Lightning's ModelParallelStrategy and FSDPStrategy do (their layouts)."""
    expected = ranks2.run(save_fsdp2, tmp_path / "theirs", layout)[0]
    convert(tmp_path / "theirs", tmp_path / "ours", to="sharded")
    nest = load(tmp_path / "ours")
    if layout == "torch":
        assert_same(nest["model"], expected["state_dict"])
        assert_same(nest["optim"], expected["optimizer"])
    else:
        assert_same(nest["state_dict"], expected["state_dict"])
        assert_same(nest["optimizer_states"], [expected["optimizer"]])
        assert (nest["epoch"], nest["global_step"], nest["lr_schedulers"]) == (1, 2, [])
    summary = inspect(tmp_path / "theirs")
    assert summary.world_size == 2
    assert summary.writer == ("torch.distributed.checkpoint" if layout == "torch" else "Lightning 2.5.0")
    assert [optimizer.by_name for optimizer in summary.optimizers] == [True]

    convert(tmp_path / "theirs", tmp_path / "a.ckpt")
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    model = Blocks()
    model.load_state_dict(found["model" if layout == "torch" else "state_dict"])
    optimizer = torch.optim.AdamW([{"params": model.blocks[2].parameters()}, {"params": model.blocks[0].parameters()}])
    optimizer.load_state_dict(found["optim"] if layout == "torch" else found["optimizer_states"][0])
    for name in ("blocks.0.weight", "blocks.2.bias"):
        parameter = model.get_parameter(name)
        assert_same(optimizer.state[parameter]["exp_avg"], expected["optimizer"]["state"][name]["exp_avg"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.001]


class Sharded(BoringModel):
    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(folder: Path) -> dict[str, Tensor]:
    logging.disable(logging.CRITICAL)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Sharded()
    trainer.fit(module)
    trainer.save_checkpoint(folder)
    return get_model_state_dict(module, options=WHOLE)


def test_lightnings_own_strategy(ranks2: Ranks, tmp_path: Path) -> None:
    expected = ranks2.run(fit, tmp_path / "theirs.ckpt")[0]
    convert(tmp_path / "theirs.ckpt", tmp_path / "one.ckpt")
    loaded = Sharded.load_from_checkpoint(tmp_path / "one.ckpt")
    assert_same(dict(loaded.state_dict()), expected)
    # stock Lightning continues: optimizer, loops and all
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Sharded()
    trainer.fit(module, ckpt_path=tmp_path / "one.ckpt")
    assert trainer.global_step == 5
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {5}


def save_flat(folder: Path) -> None:
    optimizer = torch.optim.SGD([weight := nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    dcp.save({"w": weight.detach(), "step": 3, "optimizer": optimizer.state_dict()}, checkpoint_id=folder)


def test_numbers_of_parameters_are_numbers_again(ranks2: Ranks, tmp_path: Path) -> None:
    """torch makes strings of a dictionary's keys."""
    ranks2.run(save_flat, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "a.ckpt")
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert found["step"] == 3
    torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1).load_state_dict(found["optimizer"])
    assert list(found["optimizer"]["state"]) == [0]
    assert inspect(tmp_path / "theirs").step == 3
