"""Settings that make no sense are refused when they are given, with a message that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins.precision import MixedPrecision
from models import Block, Net, Regression, alone, assert_close, loader, trainer, values
from torch import Tensor, nn

from harness import Ranks
from lightning_accel.strategies import AccelDDPStrategy, AccelFSDPStrategy, AccelZeROStrategy, fabric
from lightning_accel.strategies.options import to_device
from rows import everyday

CLASSES = [AccelDDPStrategy, AccelZeROStrategy, fabric.AccelDDPStrategy, fabric.AccelZeROStrategy]
IDS = ["trainer ddp", "trainer zero", "fabric ddp", "fabric zero"]
DDP_OPTIONS = [
    "find_unused_parameters",
    "static_graph",
    "gradient_as_bucket_view",
    "broadcast_buffers",
    "device_ids",
    "output_device",
    "delay_all_reduce_named_params",
]


@pytest.mark.parametrize("strategy", CLASSES, ids=IDS)
def test_unknown_option_names_the_nearest(strategy: Any) -> None:
    with pytest.raises(TypeError, match=r"'bucket_cap' is unknown. Did you mean 'bucket_cap_mb'\?") as error:
        strategy(bucket_cap=25)
    assert strategy.__name__ in str(error.value)


@pytest.mark.parametrize("strategy", CLASSES, ids=IDS)
def test_unknown_option_like_no_other_lists_all(strategy: Any) -> None:
    with pytest.raises(TypeError, match="'fly_me_to_the_moon' is unknown") as error:
        strategy(fly_me_to_the_moon=True)
    for option in ("units", "bucket_cap_mb", "compile", "process_group_backend", "timeout", "start_method"):
        assert option in str(error.value)
    assert "Did you mean" not in str(error.value)
    assert ("stage" in str(error.value).split("Options are")[1]) == ("ZeRO" in strategy.__name__)


def test_all_unknown_options_are_named_at_once() -> None:
    with pytest.raises(TypeError) as error:
        AccelDDPStrategy(time_out=3, fly_me_to_the_moon=True, static_graph=True)
    for option in ("time_out", "fly_me_to_the_moon", "static_graph"):
        assert repr(option) in str(error.value)


@pytest.mark.parametrize("option", DDP_OPTIONS)
@pytest.mark.parametrize("strategy", CLASSES, ids=IDS)
def test_options_of_torch_ddp_that_are_not_needed(strategy: Any, option: str) -> None:
    with pytest.raises(TypeError, match=rf"'{option}' is not needed: .*Leave it out"):
        strategy(**{option: True})


@pytest.mark.parametrize("option", ["ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period"])
def test_options_of_lightnings_ddp_that_are_not_offered(option: str) -> None:
    with pytest.raises(TypeError, match=rf"'{option}' is not offered: .*strategy='ddp'"):
        AccelDDPStrategy(**{option: None})


@pytest.mark.parametrize("strategy", CLASSES, ids=IDS)
def test_start_method(strategy: Any) -> None:
    with pytest.raises(ValueError, match="Expected start_method to be 'popen', 'spawn' or 'fork', got 'forkserver'"):
        strategy(start_method="forkserver")


@pytest.mark.parametrize("stage", [0, 5, "two"])
@pytest.mark.parametrize("strategy", [AccelZeROStrategy, fabric.AccelZeROStrategy], ids=["trainer", "fabric"])
def test_stage(strategy: Any, stage: Any) -> None:
    with pytest.raises(ValueError, match=rf"Expected stage to be one of 1, 2, 3, got {stage!r}"):
        strategy(stage=stage)


@pytest.mark.parametrize("strategy", [AccelFSDPStrategy, fabric.AccelFSDPStrategy], ids=["trainer", "fabric"])
def test_sharding(strategy: Any) -> None:
    assert strategy(sharding="partial").row.name == "fsdp_partial"
    with pytest.raises(ValueError, match="Expected sharding to be one of 'full', 'partial', 'hybrid', got 'half'"):
        strategy(sharding="half")


@pytest.mark.parametrize("size", [0, -1.0, float("nan")])
@pytest.mark.parametrize("strategy", CLASSES, ids=IDS)
def test_bucket_cap_mb(strategy: Any, size: float) -> None:
    with pytest.raises(ValueError, match="Expected bucket_cap_mb to be positive, got"):
        strategy(bucket_cap_mb=size)


# ---------------------------------------------------------------------- units


def fit_units(units: Any) -> list[str]:
    used = trainer(AccelZeROStrategy(units=units, bucket_cap_mb=1e-4))
    used.fit(Regression(), loader())
    return [unit.name for unit in used.strategy.engine.units]


def fit_fabric_units(units: Any) -> list[str]:
    used = Fabric(accelerator="cpu", devices=2, strategy=fabric.AccelZeROStrategy(units=units, bucket_cap_mb=1e-4))
    used.launch()
    net = Net()
    used.setup(net, torch.optim.SGD(net.parameters()))
    return [unit.name for unit in used.strategy.engines[0].units]


@pytest.mark.parametrize(("fit", "prefix"), [(fit_units, "net."), (fit_fabric_units, "")], ids=["trainer", "fabric"])
def test_units_by_class_and_by_name(ranks2: Ranks, fit: Any, prefix: str) -> None:
    blocks = {f"{prefix}blocks.{index}" for index in range(3)}
    for by_class, by_name in zip(
        ranks2.run(fit, [Block]), ranks2.run(fit, [f"{prefix}first", f"{prefix}last"]), strict=True
    ):
        assert blocks <= set(by_class)
        assert {f"{prefix}first", f"{prefix}last"} <= set(by_name)
        assert not blocks & set(by_name)


@pytest.mark.parametrize(
    ("units", "messages"),
    [
        (["net.blcoks"], ["'net.blcoks' matches nothing", "Linear"]),
        ([nn.Conv2d], ["Conv2d", "matches nothing", "Block"]),
        (["net", "net.blocks.0"], ["do not overlap", "'net.blocks.0' lies within 'net'"]),
    ],
    ids=["name", "class", "nested"],
)
def test_units_that_match_nothing_or_overlap(ranks2: Ranks, units: Any, messages: list[str]) -> None:
    for error in ranks2.run_expecting_error(fit_units, units):
        assert error is not None
        assert error[0] == "ValueError"
        for message in messages:
            assert message in error[1]


# ---------------------------------------------------------------------- scaler


class OwnScaler(torch.amp.GradScaler):
    pass


def scaling(plugin: Any) -> Any:
    """A precision whose scaler the engine does not know."""
    return plugin(precision="16-mixed", device="cpu", scaler=OwnScaler("cpu", init_scale=8.0))


def fit_scaled(strategy: str) -> dict[str, Tensor]:
    module = Regression().float()
    arguments = {"plugins": [scaling(MixedPrecision)]}
    used = alone(**arguments) if strategy == "auto" else trainer(f"accel_{strategy}", **arguments)
    used.fit(module, loader(dtype=torch.float32))
    return values(module)


def set_up_scaled(row: str) -> None:
    used = Fabric(accelerator="cpu", devices=2, strategy=f"accel_{row}", plugins=[scaling(FabricMixedPrecision)])
    used.launch()
    net = Net(dtype=torch.float32)
    used.setup(net, torch.optim.AdamW(net.parameters()))


@pytest.mark.parametrize("function", [fit_scaled, set_up_scaled], ids=["trainer", "fabric"])
@pytest.mark.parametrize("row", everyday(["zero1", "zero2"]))
def test_another_gradient_scaler_is_refused_where_gradients_rest_sharded(
    ranks2: Ranks, row: str, function: Any
) -> None:
    for error in ranks2.run_expecting_error(function, row):
        assert error is not None
        assert error[0] == "ValueError"
        assert f"accel_{row}" in error[1]
        assert "OwnScaler" in error[1]
        assert "grad_scaler=" in error[1]


def test_another_gradient_scaler_works_where_gradients_rest_replicated(ranks2: Ranks) -> None:
    expected = fit_scaled("auto")
    for result in ranks2.run(fit_scaled, "ddp"):
        # Forward and backward are in float16 (11 bits): a rank's gradients are rounded before they are averaged. AdamW
        # moves each weight by about the learning rate (0.02) a step for 4 steps; errors of 2**-11 matter little.
        assert_close(result, expected, tolerance=5e-3)


def test_a_module_says_where_it_was_moved() -> None:
    """As ``LightningModule.to`` has it, which cannot move a module that is in part on the meta device."""
    module = Regression()
    assert module.device == torch.device("cpu")
    to_device(module, torch.device("meta"))
    assert module.device == torch.device("meta")
