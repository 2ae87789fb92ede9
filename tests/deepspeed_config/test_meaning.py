"""What a DeepSpeed configuration means for the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_accel.core.loss_scale import LossScale
from lightning_accel.deepspeed_config import Computing, DeepSpeedConfig, Meaning, bucket_cap_mb, grad_scaler


def zero(**settings: Any) -> DeepSpeedConfig:
    return DeepSpeedConfig.read({"zero_optimization": settings})


@pytest.mark.parametrize(
    ("settings", "row", "shard_size"),
    [
        ({}, "ddp", None),
        ({"stage": 0}, "ddp", None),
        ({"stage": 1}, "zero1", None),
        ({"stage": 2}, "zero2", None),
        ({"stage": 3}, "fsdp", None),
        ({"stage": 3, "zero_hpz_partition_size": 1}, "fsdp", None),
        ({"stage": 3, "zero_hpz_partition_size": 4}, "fsdp_hybrid", 4),
        ({"stage": 3, "mics_shard_size": 2}, "fsdp_hybrid", 2),
        ({"stage": 3, "mics_shard_size": 4, "zero_hpz_partition_size": 4}, "fsdp_hybrid", 4),
        ({"stage": 1, "mics_shard_size": -1}, "zero1", None),
    ],
)
def test_rows(settings: dict[str, Any], row: str, shard_size: int | None) -> None:
    meaning = Meaning.of(zero(**settings))
    assert (meaning.row, meaning.shard_size) == (row, shard_size)


@pytest.mark.parametrize(
    ("settings", "offload", "folder"),
    [
        ({"stage": 2}, None, None),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, None, None),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}, "optimizer", None),
        ({"stage": 2, "cpu_offload": True}, "optimizer", None),
        ({"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}, "optimizer", "/nvme"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "nvme_path": "/nvme"}}, "optimizer", None),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "parameters", None),
        ({"stage": 3, "cpu_offload_param": True}, "parameters", None),
        (
            {
                "stage": 3,
                "offload_param": {"device": "nvme", "nvme_path": "/a"},
                "offload_optimizer": {"device": "nvme", "nvme_path": "/b"},
            },
            "parameters",
            "/b",
        ),
    ],
)
def test_offload(settings: dict[str, Any], offload: str | None, folder: str | None) -> None:
    meaning = Meaning.of(zero(**settings))
    assert (meaning.offload, meaning.offload_dir) == (offload, folder)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"stage": 2}, 25.0),
        ({"stage": 2, "reduce_bucket_size": 5e8}, 25.0),  # never raised
        ({"stage": 2, "reduce_bucket_size": 2**20}, 4.0),
        ({"stage": 2, "reduce_bucket_size": 2**20, "allgather_bucket_size": 2**19}, 2.0),
        ({"stage": 3, "reduce_bucket_size": 2**20, "allgather_bucket_size": 2**19}, 4.0),
        ({"stage": 3, "stage3_prefetch_bucket_size": 2**18}, 1.0),
        ({"stage": 3, "stage3_prefetch_bucket_size": 0}, 25.0),
        ({"stage": 2, "stage3_prefetch_bucket_size": 2**18}, 25.0),
    ],
)
def test_bucket_sizes_lower_the_default(settings: dict[str, Any], expected: float) -> None:
    assert bucket_cap_mb(zero(**settings)) == expected


@pytest.mark.parametrize(
    ("found", "dtype", "autocast"),
    [
        ({"fp16": {"enabled": True}}, torch.float16, True),  # at stage 0
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, torch.float16, False),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, torch.bfloat16, False),
        ({"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 3}}, torch.bfloat16, False),
        ({"torch_autocast": {"enabled": True}, "zero_optimization": {"stage": 3}}, torch.bfloat16, True),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.float16"}}, torch.float16, True),
        ({"torch_autocast": {"enabled": True, "dtype": "half"}}, torch.float16, True),
    ],
)
def test_precision(found: dict[str, Any], dtype: torch.dtype, autocast: bool) -> None:
    assert Computing.of(DeepSpeedConfig.read(found)) == Computing(dtype, autocast)


def test_no_precision() -> None:
    assert Computing.of(DeepSpeedConfig.read({"fp16": {"enabled": False}})) is None


def test_other_settings() -> None:
    found = {"communication_data_type": "bf16", "activation_checkpointing": {"number_checkpoints": 4}}
    meaning = Meaning.of(DeepSpeedConfig.read(found))
    assert meaning.reduce_dtype is torch.bfloat16
    assert meaning.activation_checkpointing
    off = {"activation_checkpointing": {"partition_activations": False, "profile": False}}
    assert not Meaning.of(DeepSpeedConfig.read(off)).activation_checkpointing


def test_what_must_be_known_at_once() -> None:
    with pytest.raises(ValueError, match="'auto' for communication_data_type"):
        Meaning.of(DeepSpeedConfig.read({"communication_data_type": "auto"}))


def test_every_loss_scale_key_is_in_the_rule() -> None:
    fp16 = {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 8,
        "loss_scale_window": 7,
        "hysteresis": 3,
        "consecutive_hysteresis": True,
        "min_loss_scale": 4,
    }
    scaler = grad_scaler(DeepSpeedConfig.read({"fp16": fp16}), "fp16")
    assert scaler is not None
    rule = scaler._scale.rule
    assert (rule.name, rule.init_scale, rule.growth_interval, rule.hysteresis) == ("deepspeed", 256.0, 7, 3)
    assert (rule.consecutive_hysteresis, rule.min_scale, rule.raise_at_min_scale) == (True, 4.0, True)


def test_the_default_rule_is_deepspeeds() -> None:
    scaler = grad_scaler(DeepSpeedConfig.read({"fp16": {"enabled": True, "loss_scale_window": 2}}), "fp16")
    assert scaler is not None
    scale, seen = LossScale(scaler._scale.rule), []
    for overflow in (False, False, False, True, True, False, False, False):
        scale.update(overflow)
        seen.append(scale.value)
    # The first step and the one after an overflow do not count; the first overflow is forgiven.
    assert seen == [2.0**16, 2.0**16, 2.0**17, 2.0**17, 2.0**16, 2.0**16, 2.0**16, 2.0**17]


def test_a_static_scale() -> None:
    scaler = grad_scaler(DeepSpeedConfig.read({"fp16": {"enabled": True, "loss_scale": 128}}), "fp16")
    assert scaler is not None
    assert scaler.get_scale() == 128.0
    assert not scaler._scale.rule.dynamic


def test_bf16_is_checked_for_overflow_unless_it_says_no() -> None:
    scaler = grad_scaler(DeepSpeedConfig.read({"bf16": {"enabled": True}}), "bf16")
    assert scaler is not None
    assert scaler.get_scale() == 1.0
    unchecked = DeepSpeedConfig.read({"bf16": {"enabled": True, "check_grad_overflow": False}})
    assert grad_scaler(unchecked, "bf16") is None
    assert grad_scaler(DeepSpeedConfig.read({}), "fp32") is None
