"""What the ranks are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_accel.launching.environment import environment, threads
from lightning_accel.launching.settings import LaunchSettings


def test_only_what_was_given() -> None:
    assert environment(LaunchSettings(), 3) == {
        "PL_TRAINER_DEVICES": "3",
        "PL_TRAINER_NUM_NODES": "1",
    }


def test_everything() -> None:
    settings = LaunchSettings(
        num_machines=2,
        main_process_ip="a",
        cpu=True,
        strategy="fsdp",
        mixed_precision="bf16",
        gradient_accumulation_steps=4,
        gradient_clipping=0.5,
        debug=True,
    )
    assert environment(settings, 2) == {
        "PL_TRAINER_DEVICES": "2",
        "PL_TRAINER_NUM_NODES": "2",
        "PL_TRAINER_ACCELERATOR": "cpu",
        "PL_TRAINER_STRATEGY": "accel_fsdp",
        "PL_TRAINER_PRECISION": "bf16-mixed",
        "PL_TRAINER_ACCUMULATE_GRAD_BATCHES": "4",
        "PL_TRAINER_GRADIENT_CLIP_VAL": "0.5",
        "ACCEL_STRATEGY": "accel_fsdp",
        "ACCEL_MIXED_PRECISION": "bf16",
        "ACCEL_CPU": "1",
        "ACCEL_DEBUG_MODE": "1",
        "ACCEL_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "CUDA_VISIBLE_DEVICES": "",
    }


def test_a_file_of_deepspeed_holds_wherever_the_script_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = environment(LaunchSettings(deepspeed_config="ds.json"), 1)
    assert found["ACCEL_DEEPSPEED_CONFIG"] == str(tmp_path / "ds.json")
    assert "PL_TRAINER_STRATEGY" not in found


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = environment(LaunchSettings(gpu_ids="1,3", mixed_precision="fp8"), 2)
    assert found["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert found["ACCEL_MIXED_PRECISION"] == "fp8"
    assert found["PL_TRAINER_PRECISION"] == "fp8-mixed"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5a, 6,7")
    assert environment(LaunchSettings(gpu_ids="2,1"), 2)["CUDA_VISIBLE_DEVICES"] == "6,GPU-5a"


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("lightning_accel.launching.environment.cores", lambda: 8)
    settings = LaunchSettings()
    assert threads(settings, 3, on_cpu=True) == 2
    assert threads(settings, 16, on_cpu=True) == 1
    assert threads(settings, 3, on_cpu=False) is None
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "5")
    assert threads(settings, 3, on_cpu=True) is None
    assert threads(LaunchSettings(num_cpu_threads_per_process=4), 3, on_cpu=False) == 4
