"""What AccelFSDPStrategy adds to the settings of all strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.strategies import StrategyRegistry
from models import Net, Regression, alone, assert_close, loader, trainer, values
from torch import Tensor, nn

from harness import Ranks
from lightning_accel import engine_of
from lightning_accel.strategies import AccelFSDPStrategy, fabric

SETTINGS = {
    "hybrid": {"sharding": "hybrid", "shard_size": 2},
    "local accumulation": {"local_accumulation": True},
    "partial, local accumulation": {"sharding": "partial", "local_accumulation": True},
    "hybrid, local accumulation": {"sharding": "hybrid", "shard_size": 2, "local_accumulation": True},
}
CLIPPING = [{"gradient_clip_val": 0.3}, {"gradient_clip_val": 0.03, "gradient_clip_algorithm": "value"}]


@pytest.fixture(scope="module")
def ranks4(ranks_of: Any) -> Ranks:
    return ranks_of(4)


def fit(settings: dict[str, Any] | None, ckpt_path: Path | None = None, **arguments: Any) -> dict[str, Tensor]:
    module = Regression()
    if settings is None:
        made = alone(**arguments)
    else:
        made = trainer(AccelFSDPStrategy(**settings), devices=dist.get_world_size(), **arguments)
    made.fit(module, loader(), ckpt_path=ckpt_path)
    return values(module)


@pytest.mark.parametrize("clipping", CLIPPING, ids=["norm", "value"])
@pytest.mark.parametrize("name", SETTINGS)
def test_fit_equals_a_single_process(ranks4: Ranks, name: str, clipping: dict[str, Any]) -> None:
    arguments = {"max_epochs": 10, "accumulate_grad_batches": 3, **clipping}  # the last window has one batch only
    expected = fit(None, **arguments)
    for result in ranks4.run(fit, SETTINGS[name], **arguments):
        assert_close(result, expected)


def fit_and_save(settings: dict[str, Any] | None, path: Path) -> None:
    module = Regression()
    if settings is None:
        made = alone(max_epochs=2)
    else:
        made = trainer(AccelFSDPStrategy(**settings), devices=dist.get_world_size(), max_epochs=2)
    made.fit(module, loader())
    made.save_checkpoint(path)


@pytest.mark.parametrize("before", [None, SETTINGS["hybrid"], {"sharding": "full"}])
@pytest.mark.parametrize("after", [None, SETTINGS["hybrid"], {"sharding": "full"}])
def test_checkpoints_go_from_and_to_hybrid(
    ranks4: Ranks, before: dict[str, Any] | None, after: dict[str, Any] | None, tmp_path: Path
) -> None:
    path = tmp_path / "two_epochs.ckpt"
    if before is None:
        fit_and_save(None, path)
    else:
        ranks4.run(fit_and_save, before, path)
    expected = fit(None, max_epochs=4)
    results = [fit(None, path, max_epochs=4)] if after is None else ranks4.run(fit, after, path, max_epochs=4)
    for result in results:
        assert_close(result, expected)


def loop(settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, int], dict[str, int]]:
    """A Fabric loop over windows of four micro-batches."""
    made = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=fabric.AccelFSDPStrategy(**settings))
    made.launch()
    net = Net()
    model, optimizer = made.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))
    for _ in range(5):
        for index, (_, x, y) in enumerate(loader()):
            with made.no_backward_sync(model, enabled=index < 3):
                made.backward(nn.functional.mse_loss(model(x), y) / 4)
        made.clip_gradients(model, optimizer, max_norm=0.3)
        optimizer.step()
        optimizer.zero_grad()
    report = engine_of(model).report()
    return values(net), report.collectives, report.at_rest


def alone_in_a_loop() -> dict[str, Tensor]:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    for _ in range(5):
        for _, x, y in loader():
            (nn.functional.mse_loss(net(x), y) / 4).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("settings", [*SETTINGS.values(), {}], ids=[*SETTINGS, "full"])
def test_fabric_loop_equals_a_single_process(ranks4: Ranks, settings: dict[str, Any]) -> None:
    expected = alone_in_a_loop()
    size = sum(value.numel() * 8 for value in expected.values())
    blocks, others = 3, 2  # units: one for each block, what comes before them and what comes after
    for result, operations, at_rest in ranks4.run(loop, settings):
        assert_close(result, expected)
        if settings.get("local_accumulation"):
            # One gather for the whole window, one more for the last backward; one reduction.
            twice = 0 if settings.get("sharding") == "partial" else blocks
            assert operations["all_gather"] == blocks + others + twice
            assert operations["reduce_scatter"] == blocks + others
            assert at_rest["gradients"] >= size
        else:
            assert operations["all_gather"] == 4 * (2 * blocks + others)
            assert operations["reduce_scatter"] == 4 * (blocks + others)
            assert at_rest["gradients"] < size * 0.6 + 1024  # the padding of five tiny units counts here
        if settings.get("sharding") == "hybrid":
            assert operations["all_reduce"] == blocks + others


@pytest.mark.parametrize("kind", [AccelFSDPStrategy, fabric.AccelFSDPStrategy], ids=["trainer", "fabric"])
def test_mistakes_are_refused_at_once(kind: Any) -> None:
    with pytest.raises(ValueError, match="Expected sharding to be one of 'full', 'partial', 'hybrid', got 'half'"):
        kind(sharding="half")
    with pytest.raises(ValueError, match="Expected shard_size with sharding='hybrid' only, got 2 with 'full'"):
        kind(shard_size=2)
    with pytest.raises(TypeError, match="Did you mean 'shard_size'"):
        kind(shards_size=2)


def test_hybrid_is_registered() -> None:
    for suffix in ("", "_spawn", "_fork", "_notebook"):
        assert StrategyRegistry.get(f"accel_fsdp_hybrid{suffix}").row.hybrid
