"""Checkpoints at URLs: fsspec's memory, which is one process's own, and files, which ranks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Net, Regression, SaveAtEnd, assert_close, loader, trainer, values
from torch import Tensor

from harness import Ranks
from lightning_accel.core.checkpoint import is_directory, load
from lightning_accel.strategies import AccelFSDPStrategy
from lightning_accel.strategies.stock import whole

FOLDER = "memory://runs/one"


@pytest.fixture
def ranks1(ranks_of: Callable[[int], Ranks]) -> Ranks:
    return ranks_of(1)


def entries(path: str) -> list[str]:
    fs, inside = fsspec.core.url_to_fs(path)
    return sorted(entry.rsplit("/", 1)[-1] for entry in fs.ls(inside, detail=False))


def clear() -> None:
    fs = fsspec.filesystem("memory")
    if fs.exists("/runs"):
        fs.rm("/runs", recursive=True)


def fit_and_resume(options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    clear()
    keeps = ModelCheckpoint(FOLDER, filename="{epoch}", save_top_k=1, monitor="epoch", mode="max", save_last=True)
    used = trainer(AccelFSDPStrategy(**options), 1, max_epochs=2, callbacks=[keeps], enable_checkpointing=True)
    module = Regression()
    used.fit(module, loader())
    used.save_checkpoint(f"{FOLDER}/by_hand.ckpt")
    used.strategy.teardown()  # a save in the background has ended
    assert keeps.best_model_path == f"{FOLDER}/epoch=1.ckpt"
    found = entries(FOLDER)
    for name in ("epoch=1.ckpt", "last.ckpt", "by_hand.ckpt"):
        assert is_directory(f"{FOLDER}/{name}") == (options.get("state_dict_type") != "full")
        assert_close(values(Regression.load_from_checkpoint(f"{FOLDER}/{name}")), values(module), tolerance=0)
    again = Regression(seed=1)
    resumed = trainer(AccelFSDPStrategy(**options), 1, max_epochs=3)
    resumed.fit(again, loader(), ckpt_path=f"{FOLDER}/by_hand.ckpt")
    assert resumed.global_step == 12
    resumed.test(Regression(seed=2), loader(), ckpt_path=f"{FOLDER}/last.ckpt", verbose=False)
    straight = Regression()
    trainer(AccelFSDPStrategy(), 1, max_epochs=3).fit(straight, loader())
    clear()
    return values(again), values(straight), found


@pytest.mark.parametrize(
    "options", [{}, {"async_save": True}, {"state_dict_type": "full"}], ids=["sharded", "async", "full"]
)
def test_a_trainer_saves_to_memory_and_resumes_from_it(ranks1: Ranks, options: dict[str, Any]) -> None:
    ((resumed, straight, found),) = ranks1.run(fit_and_resume, options)
    assert found == ["by_hand.ckpt", "epoch=1.ckpt", "last.ckpt"]
    assert_close(resumed, straight)


def resume_from_files(path: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trainer(AccelFSDPStrategy(**options), max_epochs=2, callbacks=[SaveAtEnd(path)]).fit(Regression(), loader())
    again, straight = Regression(seed=1), Regression()
    trainer(AccelFSDPStrategy(**options), max_epochs=3).fit(again, loader(), ckpt_path=path)
    trainer(AccelFSDPStrategy(), max_epochs=3).fit(straight, loader())
    return values(again), values(straight)


@pytest.mark.parametrize("options", [{}, {"async_save": True}], ids=["sharded", "async"])
def test_ranks_save_to_a_url_of_files_and_resume_from_it(
    ranks2: Ranks, options: dict[str, Any], tmp_path: Path
) -> None:
    for resumed, straight in ranks2.run(resume_from_files, f"file://{tmp_path}/deep/it.ckpt", options):
        assert_close(resumed, straight)
    assert entries(f"file://{tmp_path}/deep") == ["it.ckpt"]


def fabric_saves_and_loads(strategy: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    clear()
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    fabric.launch()
    net, again = Net(), Net(seed=1)
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))
    for _, x, y in loader():
        optimizer.zero_grad()
        fabric.backward(torch.nn.functional.mse_loss(model(x), y))
        optimizer.step()
    for number in range(2):  # over what is there
        fabric.save(f"{FOLDER}/it", {"model": model, "optimizer": optimizer, "number": number})
    other, other_optimizer = fabric.setup(again, torch.optim.AdamW(again.parameters(), lr=0.5))
    state = {"model": other, "optimizer": other_optimizer, "number": 7}
    fabric.load(f"{FOLDER}/it", state)
    raw = Net(seed=2)
    fabric.load_raw(f"{FOLDER}/it", fabric.setup_module(raw))
    assert_close(values(raw), values(net), tolerance=0)
    assert_close(whole(load(f"{FOLDER}/it"))["model"], values(net), tolerance=0)
    found = (state["number"], other_optimizer.param_groups[0]["lr"], entries(FOLDER))
    clear()
    return values(again), values(net), found


def test_fabric_saves_to_a_url_and_loads_from_it(ranks1: Ranks) -> None:
    ((loaded, expected, found),) = ranks1.run(fabric_saves_and_loads, "accel_fsdp")
    assert_close(loaded, expected, tolerance=0)
    assert found == (1, 0.02, ["it"])
