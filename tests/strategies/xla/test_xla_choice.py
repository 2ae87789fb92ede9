"""What of accel_xla needs no torch_xla: which strategy goes with which accelerator, and what is refused."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.accelerators import ACCELERATOR_REGISTRY
from lightning.fabric.plugins import precision as fabric_precision
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision, XLAPrecision
from lightning.pytorch.strategies import StrategyRegistry

from lightning_accel.core import GradScaler
from lightning_accel.core.placement import ROWS
from lightning_accel.plugins.xla_precision import suitable
from lightning_accel.strategies import AccelFSDPStrategy, AccelXLAStrategy, fabric
from lightning_accel.strategies.xla_choice import agreed


def test_both_are_registered() -> None:
    made = StrategyRegistry.get("accel_xla")
    assert isinstance(made, AccelXLAStrategy)
    assert made.row is ROWS["fsdp"]
    assert "accel_xla" in AcceleratorRegistry.available_accelerators()
    twin = STRATEGY_REGISTRY.get("accel_xla")
    assert isinstance(twin, fabric.AccelXLAStrategy)
    assert twin.row is ROWS["fsdp"]
    assert "accel_xla" in ACCELERATOR_REGISTRY.available_accelerators()


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_chosen_by_name(row: str) -> None:
    assert AccelXLAStrategy(row).row is ROWS[row]


def test_other_strategies_choose_as_before() -> None:
    for given in (("ddp", "cpu"), ("auto", "auto"), ("accel_fsdp", "auto"), (AccelFSDPStrategy(), "cuda")):
        assert agreed(*given) == given


def test_auto_follows_the_other() -> None:
    strategy = AccelXLAStrategy()
    assert agreed("accel_xla", "auto") == ("accel_xla", "accel_xla")
    assert agreed("ACCEL_XLA", "accel_xla") == ("ACCEL_XLA", "accel_xla")
    assert agreed(strategy, "auto") == (strategy, "accel_xla")
    assert agreed("auto", "accel_xla") == ("accel_xla", "accel_xla")
    twin = fabric.AccelXLAStrategy()
    assert agreed(twin, "auto") == (twin, "accel_xla")


@pytest.mark.parametrize("accelerator", ["cpu", "gpu", "tpu", CPUAccelerator()])
def test_the_strategy_on_another_accelerator(accelerator: Any) -> None:
    for strategy in ("accel_xla", AccelXLAStrategy("zero2")):
        with pytest.raises(ValueError, match=r"Expected accelerator='accel_xla' with strategy .*Leave the accelerator"):
            pl.Trainer(strategy=strategy, accelerator=accelerator)
    for strategy in ("accel_xla", fabric.AccelXLAStrategy("zero2")):
        with pytest.raises(ValueError, match=r"Expected accelerator='accel_xla' with strategy .*Leave the accelerator"):
            Fabric(strategy=strategy, accelerator=accelerator)


def test_the_strategy_with_another_accelerator_of_its_own() -> None:
    with pytest.raises(ValueError, match="Expected accelerator='accel_xla'.*got CPUAccelerator"):
        pl.Trainer(strategy=AccelXLAStrategy(accelerator=CPUAccelerator()))
    with pytest.raises(ValueError, match="Expected accelerator='accel_xla'.*got CPUAccelerator"):
        Fabric(strategy=fabric.AccelXLAStrategy(accelerator=CPUAccelerator()))


@pytest.mark.parametrize("strategy", ["accel_fsdp", "ddp", AccelFSDPStrategy()])
def test_another_strategy_on_the_accelerator(strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected strategy='accel_xla' with accelerator 'accel_xla', got .*sharding"):
        pl.Trainer(strategy=strategy, accelerator="accel_xla")


def test_another_strategy_of_fabric_on_the_accelerator() -> None:
    for strategy in ("accel_fsdp", "ddp", fabric.AccelFSDPStrategy()):
        with pytest.raises(ValueError, match=r"Expected strategy='accel_xla' with accelerator 'accel_xla', got "):
            Fabric(strategy=strategy, accelerator="accel_xla")
    with pytest.raises(ValueError, match="Expected strategy='accel_xla' with accelerator 'tpu', got AccelFSDPStrategy"):
        Fabric(strategy=fabric.AccelFSDPStrategy(), accelerator="tpu")


def test_another_row_on_tpus() -> None:
    with pytest.raises(ValueError, match="Expected strategy='accel_xla' with accelerator 'tpu', got 'accel_zero2'"):
        pl.Trainer(strategy="accel_zero2", accelerator="tpu")
    assert agreed("xla", "tpu") == ("xla", "tpu"), "Lightning's own"


@pytest.mark.skipif(find_spec("torch_xla") is not None, reason="torch_xla is installed")
@pytest.mark.parametrize("settings", [{"strategy": "accel_xla"}, {"accelerator": "accel_xla"}])
def test_without_torch_xla_the_error_names_the_extra_and_the_versions(settings: dict[str, Any]) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"torch 2\.9\.x and torch_xla 2\.9\.0.*lightning-accel\[xla\]"):
        pl.Trainer(**settings)
    with pytest.raises(ModuleNotFoundError, match=r"torch 2\.9\.x and torch_xla 2\.9\.0.*lightning-accel\[xla\]"):
        Fabric(**settings)


@pytest.mark.parametrize("kind", [AccelXLAStrategy, fabric.AccelXLAStrategy])
def test_options_that_do_not_exist(kind: Any) -> None:
    with pytest.raises(ValueError, match="Expected sharding to be one of 'ddp', .*got 'full'"):
        kind("full")
    with pytest.raises(ValueError, match="Expected shard_size with sharding='fsdp_hybrid' only, got 2 with 'fsdp'"):
        kind("fsdp", shard_size=2)
    for wrong in ("blocks", [], None):
        with pytest.raises(ValueError, match="Expected activation_checkpointing to be True, False or a list"):
            kind(activation_checkpointing=wrong)
    with pytest.raises(TypeError, match="Expected grad_scaler to be a lightning_accel.core.GradScaler, got a str"):
        kind(grad_scaler="16")
    with pytest.raises(TypeError, match="'shards_size' is unknown. Did you mean 'shard_size'"):
        kind("fsdp_hybrid", shards_size=2)


def test_precisions() -> None:
    plain, half = Precision(), HalfPrecision("bf16-true")
    assert suitable(plain) is plain
    assert suitable(half) is half
    mixed = suitable(MixedPrecision("bf16-mixed", device="cuda"))
    assert isinstance(mixed, MixedPrecision)
    assert mixed.device == "xla"
    assert mixed.scaler is None
    found = fabric.AccelXLAStrategy(precision=fabric_precision.MixedPrecision("bf16-mixed", device="cuda")).precision
    assert type(found) is fabric_precision.MixedPrecision
    assert found.device == "xla"


def test_the_scaler_of_float16() -> None:
    made = suitable(MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0)))
    assert isinstance(made, MixedPrecision)
    assert isinstance(made.scaler, GradScaler)
    assert made.scaler.get_scale() == 8.0
    given = GradScaler(rule="deepspeed")
    strategy = AccelXLAStrategy(grad_scaler=given, precision_plugin=MixedPrecision("16-mixed", device="xla"))
    assert strategy.grad_scaler is given
    assert AccelXLAStrategy().grad_scaler is None
    with pytest.raises(ValueError, match="Expected precision='16-mixed' or 'bf16-mixed' together with grad_scaler"):
        AccelXLAStrategy(grad_scaler=given, precision_plugin=Precision())
    with pytest.raises(ValueError, match=r"a gradient scaler that is enabled.*got torch\.amp\.grad_scaler\.GradScaler"):
        suitable(MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", enabled=False)))


@pytest.mark.parametrize("plugin", [DoublePrecision(), HalfPrecision("16-true")])
def test_precisions_that_are_not_offered(plugin: Precision) -> None:
    with pytest.raises(ValueError, match="Expected precision to be '32-true', '16-mixed', 'bf16-mixed' or"):
        AccelXLAStrategy(precision_plugin=plugin)


def test_the_scaler_of_float16_in_fabric() -> None:
    mixed = partial(fabric_precision.MixedPrecision, "16-mixed", device="cpu")
    strategy = fabric.AccelXLAStrategy(precision=mixed(scaler=torch.amp.GradScaler("cpu", init_scale=8.0)))
    assert type(strategy.precision) is fabric_precision.MixedPrecision
    assert strategy.precision.device == "xla"
    assert strategy.grad_scaler is not None
    assert strategy.grad_scaler.get_scale() == 8.0
    given = GradScaler(rule="deepspeed")
    assert fabric.AccelXLAStrategy(grad_scaler=given, precision=mixed()).grad_scaler is given
    assert fabric.AccelXLAStrategy().grad_scaler is None
    with pytest.raises(ValueError, match="Expected precision='16-mixed' or 'bf16-mixed' together with grad_scaler"):
        fabric.AccelXLAStrategy(grad_scaler=given, precision=fabric_precision.Precision())
    with pytest.raises(ValueError, match="Expected one gradient scaler, got one with the strategy and another"):
        fabric.AccelXLAStrategy(grad_scaler=given, precision=strategy.precision)
    with pytest.raises(ValueError, match=r"a gradient scaler that is enabled.*got torch\.amp\.grad_scaler\.GradScaler"):
        fabric.AccelXLAStrategy(precision=mixed(scaler=torch.amp.GradScaler("cpu", enabled=False)))


def test_precisions_that_fabric_is_not_offered() -> None:
    for plugin in (fabric_precision.DoublePrecision(), fabric_precision.HalfPrecision("16-true")):
        with pytest.raises(ValueError, match="'16-mixed', 'bf16-mixed' or 'bf16-true' with accel_xla, got '(64|16)-"):
            fabric.AccelXLAStrategy(precision=plugin)


def test_lightnings_plugin_for_its_own_xla_strategies_is_refused() -> None:
    plugin = XLAPrecision.__new__(XLAPrecision)  # its constructor wants torch_xla
    plugin.precision = "32-true"
    with pytest.raises(ValueError, match=r"got '32-true' \(XLAPrecision\)"):
        suitable(plugin)
