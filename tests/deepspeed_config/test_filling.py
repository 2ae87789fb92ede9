"""What stands for "auto"."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from lightning_accel.deepspeed_config import DeepSpeedConfig, Known, fill

FILE: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}
KNOWN = Known(
    ranks=2,
    micro_batch=8,
    accumulation=4,
    clipping=0.5,
    precision="bf16",
    lr=3e-4,
    weight_decay=0.1,
    betas=(0.8, 0.9),
    eps=1e-6,
    warmup_steps=10,
    total_steps=100,
    hidden_size=64,
)


def test_everything_is_filled() -> None:
    filled = fill(DeepSpeedConfig.read(FILE), KNOWN)
    assert not filled.automatic
    assert dict(filled.values) == {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "fp16.enabled": False,
        "bf16.enabled": True,
        "optimizer.type": "AdamW",
        "optimizer.params.lr": 3e-4,
        "optimizer.params.betas": (0.8, 0.9),
        "optimizer.params.eps": 1e-6,
        "optimizer.params.weight_decay": 0.1,
        "scheduler.type": "WarmupDecayLR",
        "scheduler.params.warmup_min_lr": 0.0,
        "scheduler.params.warmup_max_lr": 3e-4,
        "scheduler.params.warmup_num_steps": 10,
        "scheduler.params.total_num_steps": 100,
        "zero_optimization.stage": 3,
        "zero_optimization.reduce_bucket_size": 4096,
        "zero_optimization.stage3_prefetch_bucket_size": 3686,
        "zero_optimization.stage3_param_persistence_threshold": "auto",  # does nothing here
    }


def test_the_files_own_numbers_come_first() -> None:
    found = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
    }
    filled = fill(DeepSpeedConfig.read(found), KNOWN)
    assert filled["train_batch_size"] == 2 * 4 * 2
    assert filled["scheduler.params.warmup_max_lr"] == 1e-2


def test_what_cannot_be_filled_is_named() -> None:
    with pytest.raises(ValueError, match=r"train_batch_size \(the DataLoader's.*optimizer.params.lr \(lr or") as error:
        fill(DeepSpeedConfig.read(FILE), Known(ranks=2, precision="fp32", clipping=0.0, accumulation=1))
    assert "stage3_param_persistence_threshold" not in str(error.value)
    assert "gradient_clipping" not in str(error.value)
    with pytest.raises(ValueError, match=r"got none for fp16.hysteresis \(nothing says it\)"):
        fill(DeepSpeedConfig.read({"fp16": {"hysteresis": "auto"}}), KNOWN)


def test_parts_can_be_filled_alone() -> None:
    filled = fill(DeepSpeedConfig.read(FILE), Known(ranks=2, precision="fp16"), ("fp16.", "bf16."))
    assert filled["fp16.enabled"] is True
    assert filled["bf16.enabled"] is False
    assert "optimizer.params.lr" in filled.automatic


def test_what_was_filled_in_is_checked() -> None:
    config = DeepSpeedConfig.read({"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}})
    with pytest.raises(ValueError, match="got fp16 and bf16"):
        fill(config, KNOWN)


def test_other_processes_get_the_same() -> None:
    config = pickle.loads(pickle.dumps(DeepSpeedConfig.read(FILE)))
    assert dict(config.values) == dict(DeepSpeedConfig.read(FILE).values)
    assert fill(config, KNOWN)["optimizer.params.lr"] == 3e-4
