"""`config=` of AccelZeROStrategy: a DeepSpeed file decides what nothing else says."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning_utilities.core import rank_zero
from models import Regression, alone, assert_close, loader, trainer, values
from torch import Tensor, nn

import lightning_accel.strategies.fabric as twins
from harness import Ranks
from lightning_accel import engine_of
from lightning_accel.deepspeed_config import DeepSpeedConfig, making
from lightning_accel.strategies import AccelZeROStrategy
from lightning_accel.strategies.deepspeed_file import FromFile

SEED = {
    "zero_optimization": {"stage": 2},
    "train_batch_size": "auto",
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
}
FULL: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.1,
    "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.5}},
}


class NoOptimizer(Regression):
    """Leaves the optimizer to the file."""

    def configure_optimizers(self) -> Any:
        return None


class Given(Regression):
    """Has one of its own."""

    def __init__(self, kind: type[torch.optim.Optimizer], **settings: Any) -> None:
        super().__init__()
        self.own = (kind, settings)

    def configure_optimizers(self) -> Any:
        kind, settings = self.own
        return kind(self.parameters(), **settings)


def fit(config: dict[str, Any], module: Regression, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The values after a fit under a file, and what it has made of the Trainer."""
    data = loader(dtype=settings.pop("dtype", torch.float64))
    used = trainer(AccelZeROStrategy(config=config), max_epochs=2, **settings)
    used.fit(module, data)
    strategy = used.strategy
    (optimizer,) = strategy.optimizers
    told = {
        "row": strategy.engine.report().row,
        "accumulation": used.accumulate_grad_batches,
        "clipping": used.gradient_clip_val,
        "steps": used.global_step,
        "optimizer": type(optimizer).__name__,
        "precision": str(used.precision),
        "rule": strategy.grad_scaler and strategy.grad_scaler._scale.rule,
        "bucket": strategy._options.bucket_cap_mb,
    }
    return values(module), told


def fit_file(config: dict[str, Any], **settings: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return fit(config, NoOptimizer(), **settings)


def expect(kind: type[torch.optim.Optimizer], clipping: float, accumulation: int, **settings: Any) -> dict[str, Tensor]:
    """Stock Lightning on one device."""
    module = Given(kind, **settings)
    used = alone(max_epochs=2, gradient_clip_val=clipping, accumulate_grad_batches=accumulation)
    used.fit(module, loader())
    return values(module)


def test_the_seed_configuration_runs_as_it_stands(ranks2: Ranks) -> None:
    expected = expect(torch.optim.AdamW, 1.0, 1, lr=1e-3, weight_decay=0.0)
    for found, told in ranks2.run(fit_file, SEED):
        assert_close(found, expected)
        assert (told["row"], told["optimizer"], told["clipping"], told["steps"]) == ("zero2", "AdamW", 1.0, 8)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_accumulation_clipping_and_the_optimizer_come_from_the_file(ranks2: Ranks, stage: int) -> None:
    expected = expect(torch.optim.SGD, 0.1, 2, lr=0.02, momentum=0.5)  # lr is the module's
    config = {**FULL, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": stage}}
    for found, told in ranks2.run(fit_file, config):
        assert_close(found, expected)
        assert (told["accumulation"], told["clipping"], told["steps"]) == (2, 0.1, 4)
        assert told["row"] == {0: "ddp", 1: "zero1", 3: "fsdp"}[stage]


def test_auto_is_what_the_trainer_says(ranks2: Ranks) -> None:
    config = {**FULL, "gradient_clipping": "auto", "zero_optimization": {"stage": 1}}
    expected = expect(torch.optim.SGD, 0.3, 2, lr=0.02, momentum=0.5)
    for found, told in ranks2.run(fit_file, config, accumulate_grad_batches=2, gradient_clip_val=0.3):
        assert_close(found, expected)
        assert told["clipping"] == 0.3


def refused(config: dict[str, Any], **settings: Any) -> str:
    try:
        fit_file(config, **settings)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_what_does_not_agree_is_refused(ranks2: Ranks) -> None:
    def told(config: dict[str, Any], **settings: Any) -> str:
        first, second = ranks2.run(refused, config, **settings)
        assert first == second
        return first

    full = {**FULL, "gradient_accumulation_steps": 2}
    assert "accumulate_grad_batches=4" in told(full, accumulate_grad_batches=4)
    assert "gradient_clip_val=0.5" in told(full, gradient_clip_val=0.5)
    assert "by norm" in told(full, gradient_clip_algorithm="value")
    assert "16 = 4 × 3 × 2? 4 × 3 × 2 = 24" in told({**full, "gradient_accumulation_steps": 3})
    batches = told({**full, "train_batch_size": 32, "train_micro_batch_size_per_gpu": 8})
    assert "(32 = 8 × 2 × 2), got a DataLoader with batch_size=4 (4 × 2 × 2 = 16)" in batches
    wide = told({**full, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    assert "zero_optimization.reduce_bucket_size (hidden_size of the model's config)" in wide
    params = {"lr": 0.1, "eps": "auto"}
    assert "optimizer.params.eps" in told({**full, "optimizer": {"type": "AdamW", "params": params}})


def told_at_the_end(config: dict[str, Any]) -> list[str]:
    told: list[str] = []
    with patch.object(rank_zero.log, "info", lambda message, **_: told.append(str(message))):
        fit_file(config)
    return [message for message in told if "optimizer steps" in message]


def test_a_report_at_the_end(ranks2: Ranks) -> None:
    config = {**SEED, "comms_logger": {"enabled": True}}
    first, second = ranks2.run(told_at_the_end, config)
    assert len(first) == 1
    assert first[0].startswith("accel_zero2, rank 0 of 2, after 8 optimizer steps")
    assert not second
    assert ranks2.run(told_at_the_end, SEED) == [[], []]


def fit_twice(config: dict[str, Any]) -> list[float]:
    """The learning rates of two fits with modules that say different ones."""
    used = trainer(AccelZeROStrategy(config=config))
    found = []
    for lr in (0.02, 0.05):
        used.fit(NoOptimizer(lr=lr), loader())
        found.append(used.strategy.optimizers[0].param_groups[0]["lr"])
    return found


def test_each_fit_fills_anew(ranks2: Ranks) -> None:
    assert ranks2.run(fit_twice, {**FULL, "train_batch_size": "auto"}) == [[0.02, 0.05]] * 2


class Halving(Given):
    """Notes what the learning rate is in each step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates = [*getattr(self, "rates", ()), self.optimizers().param_groups[0]["lr"]]  # type: ignore[union-attr]


def fit_schedule(config: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """Learning rates and the schedule's settings, with a schedule that halves them in each step."""
    settings: dict[str, Any] = {}

    def halve(filled: DeepSpeedConfig, optimizer: torch.optim.Optimizer) -> Any:
        settings.update(filled.params("scheduler"))
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    module = Halving(torch.optim.SGD, lr=0.08)
    with patch.object(making, "make_scheduler", halve):
        fit(config, module, accumulate_grad_batches=2)
    return module.rates, settings


def test_the_schedule_steps_with_the_optimizer_of_the_module(ranks2: Ranks) -> None:
    params = {"total_num_steps": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 2}
    config = {"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupDecayLR", "params": params}}
    for rates, settings in ranks2.run(fit_schedule, config):
        assert rates == [0.08, 0.08, 0.04, 0.04, 0.02, 0.02, 0.01, 0.01]
        assert settings == {"total_num_steps": 4, "warmup_max_lr": 0.08, "warmup_num_steps": 2}


class Grouped(Given):
    """Weights and biases have rates of their own."""

    def configure_optimizers(self) -> Any:
        kind, settings = self.own
        weights = [one for one in self.parameters() if one.dim() > 1]
        biases = [one for one in self.parameters() if one.dim() == 1]
        return kind([{"params": weights, "lr": 0.32}, {"params": biases}], **settings)


def fit_auto(module: type[Given], config: dict[str, Any]) -> Any:
    used = module(torch.optim.SGD, lr=0.08)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the file's optimizer
        fit(config, used)
    return used.trainer.lr_scheduler_configs[0].scheduler.max_lrs


@pytest.mark.parametrize(("module", "highest"), [(Given, [0.08]), (Grouped, [0.32, 0.08])])
def test_an_auto_schedule_rises_to_the_rates_of_the_optimizer_that_is_used(
    ranks2: Ranks, module: type[Given], highest: list[float]
) -> None:
    config = {
        "optimizer": {"type": "SGD", "params": {"lr": 0.002}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 2}},
    }
    assert ranks2.run(fit_auto, module, config) == [highest] * 2


class ByHand(Given):
    """Optimizes by hand, and leaves accumulation out."""

    def __init__(self) -> None:
        super().__init__(torch.optim.SGD, lr=0.02, momentum=0.5)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 0.1)
        optimizer.step()


def fit_by_hand(config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, told = fit(config, ByHand())
    return found, told, [str(warning.message) for warning in caught]


def test_a_loop_by_hand_is_left_alone_and_told(ranks2: Ranks) -> None:
    expected = expect(torch.optim.SGD, 0.1, 1, lr=0.02, momentum=0.5)
    config = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5, "zero_optimization": {"stage": 2}}
    results = ranks2.run(fit_by_hand, config)
    for found, told, _ in results:
        assert_close(found, expected)
        assert (told["accumulation"], told["clipping"]) == (1, None)
    said = "gradient_accumulation_steps, gradient_clipping are left to training_step, which optimizes by hand"
    assert any(said in message for message in results[0][2])


class Wide(NoOptimizer):
    """As models of Transformers say how wide they are."""

    def __init__(self) -> None:
        super().__init__()
        self.net.config = type("Config", (), {"hidden_size": 512})()  # type: ignore[assignment]


def fit_wide(config: dict[str, Any]) -> Any:
    return fit(config, Wide())[1]["bucket"]


def test_bucket_sizes_from_the_models_width(ranks2: Ranks) -> None:
    config = {**SEED, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    assert ranks2.run(fit_wide, config) == [1.0, 1.0]  # 512 × 512 numbers of four bytes


def fit_own(config: dict[str, Any]) -> tuple[dict[str, Tensor], str, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, told = fit(config, Given(torch.optim.SGD, lr=0.02, momentum=0.5), gradient_clip_val=0.1)
    return found, told["optimizer"], [str(warning.message) for warning in caught]


def test_configure_optimizers_wins_and_says_so(ranks2: Ranks) -> None:
    expected = expect(torch.optim.SGD, 0.1, 1, lr=0.02, momentum=0.5)
    results = ranks2.run(fit_own, SEED)
    for found, kind, _ in results:
        assert_close(found, expected)
        assert kind == "SGD"
    assert any("has another (Adam): the former is used. Return None" in message for message in results[0][2])


FP16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 3, "hysteresis": 3, "min_loss_scale": 2}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_has_the_files_loss_scale(ranks2: Ranks, stage: int) -> None:
    config = {**SEED, "zero_optimization": {"stage": stage}, "fp16": FP16}
    for found, told in ranks2.run(fit_file, config, dtype=torch.float32):
        assert all(value.dtype is torch.float32 for value in found.values())  # master values
        rule = told["rule"]
        assert (told["precision"], rule.name, rule.init_scale) == ("16-mixed", "deepspeed", 16.0)
        assert (rule.growth_interval, rule.hysteresis, rule.min_scale) == (3, 3, 2.0)


def test_precision_auto_is_the_trainers(ranks2: Ranks) -> None:
    config = {**SEED, "fp16": {**FP16, "enabled": "auto"}, "bf16": {"enabled": "auto"}}
    for precision, rule in (("16-mixed", "deepspeed"), ("bf16-mixed", "static"), ("32-true", None)):
        for _, told in ranks2.run(fit_file, config, precision=precision):
            assert told["precision"] == precision
            assert (told["rule"] and told["rule"].name) == rule


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        ({"bf16": {"enabled": True}}, "16-mixed"),
        ({"bf16": {"enabled": True}}, "bf16-true"),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": False}}, "bf16-mixed"),
    ],
)
def test_another_precision_is_refused(config: dict[str, Any], precision: Any) -> None:
    with pytest.raises(ValueError, match=f"Expected precision to be said once, got '{precision}'"):
        pl.Trainer(accelerator="cpu", strategy=AccelZeROStrategy(config=config), precision=precision, logger=False)


@pytest.mark.parametrize("kind", [AccelZeROStrategy, twins.AccelZeROStrategy])
def test_arguments_and_the_file(kind: Any, tmp_path: Path) -> None:
    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": offload, "zero_hpz_partition_size": 2}}
    made = kind(config=config, stage=3)
    assert (made.row.name, made.stage) == ("fsdp_hybrid", 3)
    options = made._options
    assert (options.offload, options.offload_dir, options.shard_size) == ("optimizer", str(tmp_path), 2)
    assert pickle.loads(pickle.dumps(made._file)).row == made.row  # spawned ranks get it so
    with pytest.raises(ValueError, match=r"got stage=2 and zero_optimization.stage 3 in config\. Leave stage out"):
        kind(config=config, stage=2)
    with pytest.raises(ValueError, match="Expected offload to be said once, got 'parameters' and 'optimizer'"):
        kind(config=config, offload="parameters")
    small = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 2**18}}
    assert kind(config=small)._options.bucket_cap_mb == 1.0
    assert kind(config=small, bucket_cap_mb=7.0)._options.bucket_cap_mb == 7.0
    assert kind().stage == 2


def test_what_is_left_out_is_one_warning() -> None:
    config = {"dump_state": True, "zero_optimization": {"stage": 2, "overlap_comm": True}}
    with pytest.warns(UserWarning, match=r"(?s)not taken over.*dump_state.*overlap_comm: reductions overlap"):
        AccelZeROStrategy(config=config)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ({"comms_logger": {"enabled": True}, "steps_per_print": 2}, 2),
        ({"memory_breakdown": True, "steps_per_print": float("inf")}, 0),
        ({"memory_breakdown": True}, 0),
        ({"wall_clock_breakdown": True, "steps_per_print": 1}, 5),
        ({"steps_per_print": 2}, 0),
    ],
)
def test_reports_come_at_the_files_interval(asked: dict[str, Any], shown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reported:
        def report(self, *, all_ranks: bool) -> str:
            return "report" * all_ranks

    found: list[str] = []
    monkeypatch.setattr("lightning_accel.strategies.deepspeed_reports.rank_zero_info", found.append)
    read = FromFile(asked, None, {})
    for _ in range(5):
        read.note_step(Reported())  # type: ignore[arg-type]
    assert found == ["report"] * shown


def fabric_step(config: dict[str, Any]) -> tuple[str, str, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fabric = Fabric(accelerator="cpu", devices=2, strategy=twins.AccelZeROStrategy(config=config))
        fabric.launch()
        net = nn.Linear(4, 4)
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        fabric.backward(model(torch.ones(2, 4)).square().mean())
        optimizer.step()
    messages = [str(warning.message) for warning in caught]
    return engine_of(net).report().row, str(fabric.strategy.precision.precision), messages


def test_fabric(ranks2: Ranks) -> None:
    config = {**FULL, "gradient_accumulation_steps": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    results = ranks2.run(fabric_step, config)
    assert [result[:2] for result in results] == [("zero1", "bf16-mixed")] * 2
    assert any("gradient_clipping, optimizer.type are left to the loop" in message for message in results[0][2])
