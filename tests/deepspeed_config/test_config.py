"""Reading a DeepSpeed configuration: what is refused, and what is said about the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_accel.deepspeed_config import DeepSpeedConfig
from lightning_accel.deepspeed_config.keys import KEYS, SECTIONS, Kind


def read(found: dict[str, Any]) -> DeepSpeedConfig:
    return DeepSpeedConfig.read(found)


def zero(**settings: Any) -> DeepSpeedConfig:
    return read({"zero_optimization": settings})


def test_a_path_and_a_dict_say_the_same(tmp_path: Path) -> None:
    found = {"train_batch_size": 8, "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(found))
    for source in (path, str(path), found):
        config = DeepSpeedConfig.read(source)
        assert dict(config.values) == {
            "train_batch_size": 8,
            "zero_optimization.stage": 3,
            "zero_optimization.offload_param.device": "cpu",
        }
    assert DeepSpeedConfig.read(config) is config


def test_what_is_not_there_is_deepspeeds_default() -> None:
    config = read({})
    assert config["gradient_clipping"] == 1.0
    assert config["fp16.hysteresis"] == 2
    assert "gradient_clipping" not in config
    assert config.given("gradient_clipping") is None


def test_nothing_can_be_changed() -> None:
    config = read({"train_batch_size": 8})
    with pytest.raises(TypeError, match="assignment"):
        config.values["train_batch_size"] = 9  # type: ignore[index]


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"got '.*nowhere\.json': there is none"):
        DeepSpeedConfig.read(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "train_batch_size": 8,\n}', "line 3, column 1"),
        ('{"a": 1 // why\n}', "line 1, column 9"),
        ("[]", "Expected names and values in .*, got a list"),
        ('{"fp16": {"enabled": true, "enabled": false}}', "each key once, got enabled twice"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        DeepSpeedConfig.read(path)


def test_neither_path_nor_dict() -> None:
    with pytest.raises(TypeError, match="path or a dict, got list"):
        DeepSpeedConfig.read([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"train_batchsize": 8}, r"'train_batchsize' \(did you mean 'train_batch_size'\?\)"),
        ({"zero_optimization": {"stge": 2}}, r"'zero_optimization.stge' \(did you mean 'stage'\?\)"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, r"did you mean 'device'"),
        ({"zero_optimizaton": {"stage": 2}}, r"did you mean 'zero_optimization'"),
        ({"stage": 2}, r"'stage' \(did you mean 'zero_optimization.stage'\?\)"),
        ({"fp16": {"gradient_clipping": 2}}, r"did you mean 'gradient_clipping'"),
        ({"optimizer": {"type": "Adam", "params": {"learning_rate": 1}}}, "'optimizer.params.learning_rate'"),
        ({"optimizer": {"type": "Lion", "params": {"betaz": 1}}}, r"did you mean 'betas'"),
        ({"optimizer": {"type": "Adamm"}}, r"did you mean 'Adam"),
        ({"optimizer": {"type": "OneBitAdam"}}, "removed from DeepSpeed"),
        ({"optimizer": {"type": "MuAdam"}}, "mup"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.type"),
        ({"optimizer": {"type": "RMSprop", "params": {"alfa": 1}}}, "did you mean 'alpha'"),
        ({"scheduler": {"type": "WarmUp"}}, r"did you mean 'WarmupLR'"),
        ({"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 3}}}, "scheduler.params.total_num_steps"),
    ],
)
def test_unknown_keys_come_with_the_nearest(found: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(found)


def test_all_unknown_keys_are_in_one_message() -> None:
    with pytest.raises(ValueError, match=r"'train_batch_sise'.*'zero_optimization.overlap_com'"):
        read({"train_batch_sise": 8, "zero_optimization": {"overlap_com": True}})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"train_batch_size": 0}, "train_batch_size in config to be a whole number of at least 1, got 0"),
        ({"train_batch_size": 2.5}, "got 2.5"),
        ({"train_batch_size": True}, "got True"),
        ({"train_batch_size": "8"}, "got '8'"),
        ({"gradient_clipping": -1}, "a number of at least 0, got -1"),
        ({"zero_optimization": {"stage": 4}}, "a whole number from 0 to 3, got 4"),
        ({"zero_optimization": {"stage": "auto"}}, "stage 0, 1, 2 or 3"),
        ({"zero_optimization": True}, 'Use {"stage": 1}'),
        ({"zero_optimization": 2}, "Expected names and values as zero_optimization"),
        ({"fp16": {"enabled": 1}}, "true or false, got 1"),
        ({"fp16": {"loss_scale": float("nan")}}, "got nan"),
        ({"fp16": {"enabled": True, "hysteresis": 0}}, "at least 1"),
        ({"fp16": {"enabled": True, "initial_scale_power": 2, "min_loss_scale": 8}}, r"got 8 and 2\^2"),
        ({"communication_data_type": "fp8"}, "'fp32', 'fp16', 'bf16'"),
        ({"gradient_allreduce_op": "sum"}, "averaged over ranks"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "got fp16 and bf16"),
        ({"fp16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "got fp16 and torch_autocast"),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, "two numbers"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "fast"}}}, "got 'fast'"),
        ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, "corrected for their bias"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cubic"}}}, "'log', 'linear'"),
    ],
)
def test_values_of_another_kind(found: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "stage 1 to 3 for offload_optimizer.*shards nothing"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "stage 3 for offload_param.*got 2"),
        ({"stage": 2, "cpu_offload_param": True}, "stage 3 for offload_param"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, "nvme_path"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}, "cpu_offload": True}, "got both"),
        ({"stage": 2, "zero_hpz_partition_size": 2}, "stage 3 for zero_hpz_partition_size"),
        ({"stage": 3, "zero_hpz_partition_size": 2, "mics_shard_size": 4}, "mics_shard_size=4"),
    ],
)
def test_what_a_stage_does_not_divide(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zero(**settings)


def test_what_deepspeed_has_removed() -> None:
    with pytest.raises(ValueError, match=r"removed from it: amp \(use fp16.*elasticity"):
        read({"amp": {"enabled": True}, "elasticity": {"enabled": True}})
    told = read({"amp": {"enabled": False}, "sparse_gradients": False}).describe_left_out()
    assert told is not None
    assert "removed from DeepSpeed: amp" in told
    assert "sparse_gradients" in told


def test_everything_else_is_in_one_message() -> None:
    found = {
        "train_batch_size": 8,
        "dump_state": True,
        "flops_profiler": {"enabled": False, "recompute_fwd_factor": 1.0},
        "tensorboard": {"enabled": False},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
        "data_types": None,
    }
    told = read(found).describe_left_out()
    assert told is not None
    named = ["dump_state", "flops_profiler.recompute_fwd_factor", "tensorboard", "optimizer.params.fused"]
    for name in (*named, "zero_optimization.overlap_comm", "zero_optimization.contiguous_gradients"):
        assert name in told
    for name in ("train_batch_size", "stage", "lr", "torch_adam", "data_types"):
        assert f" {name}" not in told
    assert read({"train_batch_size": 8}).describe_left_out() is None


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.kind in (Kind.NOT_OFFERED, Kind.REMOVED)])
def test_every_key_that_does_nothing_says_so(name: str) -> None:
    found: dict[str, Any] = {}
    *sections, own = name.split(".")
    inner = found
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[own] = False if KEYS[name].kind is Kind.REMOVED else "auto"
    told = read(found).describe_left_out()
    assert told is not None
    assert name in told
    assert KEYS[name].why in told


def test_no_key_is_both_a_value_and_a_section() -> None:
    assert not SECTIONS & set(KEYS)


def test_the_table_has_all_of_deepspeeds_keys() -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
    offload = pytest.importorskip("deepspeed.runtime.zero.offload_config")
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    models = {
        "zero_optimization": zero_config.DeepSpeedZeroConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "fp16": precision.DeepSpeedFP16Config,
        "bf16": precision.DeepSpeedBF16Config,
    }
    names = [f"zero_optimization.{name}" for name in config._REMOVED_ZERO_CONFIG_KEYS]
    names += [*config._REMOVED_TOP_LEVEL_CONFIG_KEYS]
    for section, model in models.items():
        for name, field in model.model_fields.items():
            names += [f"{section}.{name}"] + ([f"{section}.{field.alias}"] if field.alias else [])
    missing = [name for name in names if name not in KEYS and name not in SECTIONS]
    assert not missing
