"""Precision plugins that clip through the engine, by themselves: no ranks but this one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import nn

from lightning_accel.core import Engine, GradScaler
from lightning_accel.plugins.precision import engine_optimizer, require_known_scaler, with_engine

PLUGINS = [
    Precision(),
    DoublePrecision(),
    HalfPrecision("bf16-true"),
    MixedPrecision("bf16-mixed", device="cpu"),
    MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu")),
]
IDS = ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"]
UNSCALED = PLUGINS[:4]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Trained:
    """A layer with gradients of 3 and 4, of an optimizer that the engine has."""

    def __init__(self, row: str = "zero2") -> None:
        self.layer = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=1.0)
        self.engine = Engine(self.layer, row)
        self.engine.add_optimizer(self.optimizer)
        self.engine.backward(3 * self.layer.weight.sum() + 4 * self.layer.bias.sum())

    def gradients(self) -> list[float]:
        gradients = [self.engine.full_gradient(parameter) for parameter in self.layer.parameters()]
        return [gradient.item() for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("plugin", PLUGINS, ids=IDS)
def test_the_copy_is_of_the_same_class_and_the_original_is_left_alone(plugin: Precision) -> None:
    before = dict(vars(plugin))
    changed = with_engine(plugin)
    assert type(changed) is type(plugin)
    assert changed is not plugin
    assert vars(plugin) == before
    replaced = ("clip_gradients", "scaler")
    assert {k: v for k, v in vars(changed).items() if k not in replaced} == {
        k: v for k, v in before.items() if k not in replaced
    }
    assert type(changed).__qualname__ == type(plugin).__qualname__  # the name that its state is saved under


@pytest.mark.parametrize("plugin", UNSCALED, ids=IDS[:4])
@pytest.mark.parametrize("row", ["ddp", "zero1", "zero2"])
def test_norm_is_clipped(plugin: Precision, row: str) -> None:
    trained = Trained(row)
    with_engine(plugin).clip_gradients(trained.optimizer, 0.5)
    # 5 is the norm of (3, 4); torch divides by it plus 1e-6.
    assert trained.gradients() == pytest.approx([0.3, 0.4], rel=1e-6)


@pytest.mark.parametrize("plugin", UNSCALED, ids=IDS[:4])
@pytest.mark.parametrize("row", ["ddp", "zero1", "zero2"])
def test_values_are_clamped(plugin: Precision, row: str) -> None:
    trained = Trained(row)
    with_engine(plugin).clip_gradients(trained.optimizer, 3.5, GradClipAlgorithmType.VALUE)
    assert trained.gradients() == [3.0, 3.5]


@pytest.mark.parametrize("limit", [0, 0.0])
def test_zero_clips_nothing(limit: float) -> None:
    trained = Trained()
    with_engine(Precision()).clip_gradients(trained.optimizer, limit)
    assert trained.gradients() == [3.0, 4.0]


@pytest.mark.parametrize("limit", [-1.0, math.nan])
@pytest.mark.parametrize("algorithm", [GradClipAlgorithmType.NORM, GradClipAlgorithmType.VALUE])
def test_limits_that_are_none(limit: float, algorithm: GradClipAlgorithmType) -> None:
    trained = Trained()
    with pytest.raises(ValueError, match=f"> 0.* got {limit}"):
        with_engine(Precision()).clip_gradients(trained.optimizer, limit, algorithm)
    assert trained.gradients() == [3.0, 4.0]


def test_an_optimizer_that_no_engine_has_is_clipped_by_the_plugin() -> None:
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    (3 * layer.weight.sum() + 4 * layer.bias.sum()).backward()
    with_engine(Precision()).clip_gradients(optimizer, 0.5)
    assert [p.grad.item() for p in layer.parameters()] == pytest.approx([0.3, 0.4], rel=1e-6)


def test_engine_optimizer_sees_through_lightnings_wrapper() -> None:
    trained = Trained()
    found = engine_optimizer(trained.optimizer)
    assert found is not None
    assert found.engine is trained.engine
    assert engine_optimizer(LightningOptimizer(trained.optimizer)) is found
    assert engine_optimizer(torch.optim.SGD(nn.Linear(1, 1).parameters())) is None


class OwnScaler(torch.amp.GradScaler):
    pass


def test_a_plugin_with_a_scaler_of_its_own_clips_by_itself() -> None:
    # Its rules about who unscales what before clipping are its own.
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=OwnScaler("cpu"))
    calls: list[Any] = []
    plugin.clip_grad_by_norm = lambda optimizer, limit: calls.append(limit)  # type: ignore[method-assign]
    with_engine(plugin).clip_gradients(Trained("ddp").optimizer, 0.5)
    assert calls == [0.5]


class OwnClipping(MixedPrecision):
    def clip_gradients(self, *_: Any) -> None:
        raise NotImplementedError


def test_a_class_that_clips_in_its_own_way_still_scales_through_the_engine() -> None:
    changed = with_engine(OwnClipping("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu")))
    assert isinstance(changed.scaler, GradScaler)
    with pytest.raises(NotImplementedError):
        changed.clip_gradients(Trained().optimizer, 0.5)


def test_wrapping_twice_is_wrapping_once() -> None:
    # A strategy that is given to a second Trainer gets the plugin that the first one has changed already.
    trained = Trained()
    with_engine(with_engine(Precision())).clip_gradients(trained.optimizer, 0.5)
    assert trained.gradients() == pytest.approx([0.3, 0.4], rel=1e-6)


@pytest.mark.parametrize("plugin", PLUGINS, ids=IDS)
def test_known_scalers_are_accepted(plugin: Precision) -> None:
    require_known_scaler(with_engine(plugin), "zero2")


def test_another_scaler_is_refused() -> None:
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=OwnScaler("cpu"))
    with pytest.raises(ValueError, match=r"GradScaler for strategy='accel_zero1', got .*OwnScaler.*grad_scaler="):
        require_known_scaler(with_engine(plugin), "zero1")
