"""The command line, in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

STATE = {"layer.weight": torch.ones(4, 3), "layer.bias": torch.zeros(4, dtype=torch.bfloat16)}


def accel(*arguments: str | Path) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "lightning_accel.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_convert_and_inspect(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(4, 3)}}, "param_groups": [{"params": [0, 1]}]}
    name = f"{'a' * 100}.ckpt"  # wider than a terminal, which there is none of here
    checkpoint = {"state_dict": STATE, "optimizer_states": [optimizer], "global_step": 7, "epoch": 2}
    torch.save({**checkpoint, "pytorch-lightning_version": "2.6.0"}, tmp_path / name)
    code, out, err = accel("convert", tmp_path / name, tmp_path / "model.safetensors")
    assert (code, err) == (0, "")
    assert out == (
        f"{tmp_path / name} (file of torch.save) -> {tmp_path}/model.safetensors (safetensors): 2 tensors, 56 B\n"
        "Left out: optimizer_states: only the model is written\n"
    )
    code, out, err = accel("inspect", tmp_path / name)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    for expected in (
        f"path {tmp_path / name}",
        "format file of torch.save",
        "written by Lightning 2.6.0",
        "epoch 2",
        "step 7",
        "Model: 2 tensors, 16 elements",
        "│ layer.weight │ [4, 3] │ float32 │ 48 B │",
        "│ layer.bias │ [4] │ bfloat16 │ 8 B │",
        "Optimizer optimizer_states.0: 1 groups, 2 parameters by number",
        "│ 0 │ exp_avg float32 [4, 3] │",
    ):
        assert expected.split() in lines, out
