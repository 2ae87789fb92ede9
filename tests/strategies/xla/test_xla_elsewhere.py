"""Checkpoints between gloo processes of another environment and accel_xla, and back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from litnet import FLOAT32, LitNet, SaveAfter, difference, litnet, loader, trainer

from lightning_accel.strategies import AccelXLAStrategy

pytestmark = [pytest.mark.xla, pytest.mark.timeout(600)]

PYTHON = os.environ.get("LIGHTNING_ACCEL_OTHER_PYTHON", sys.executable)
"""What runs the gloo side: the interpreter of another environment, with another torch, say."""
FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]


def on_gloo(*arguments: Any) -> None:
    # Where SPMD is on, torch_xla has it be on in processes that are started from there as well.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "PJRT_", "CPU_NUM"))}
    env |= {"PYTHONPATH": f"{ROOT}:{FOLDER}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [PYTHON, str(FOLDER / "elsewhere.py"), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert ended.returncode == 0, ended.stderr[-5000:]


def here(
    chosen: Any, epochs: int, folder: Path, resume: Path | None = None, after: int | None = None
) -> tuple[LitNet, Path]:
    model, path = litnet(schedule=True), folder / f"here{epochs}.ckpt"
    callbacks = [] if after is None else [SaveAfter(after, path)]
    fit = trainer(chosen, max_epochs=epochs, gradient_clip_val=0.3, callbacks=callbacks)
    fit.fit(model, loader(elsewhere.BATCHES), ckpt_path=resume)
    if after is None:
        fit.save_checkpoint(path)
    return model, path


@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize(("strategy", "row"), [("accel_fsdp", "fsdp"), ("accel_zero2", "zero2")])
def test_a_run_goes_from_gloo_to_the_devices_and_back(strategy: str, row: str, kind: str, tmp_path: Path) -> None:
    there, back, values = tmp_path / "there", tmp_path / "back", tmp_path / "values"
    on_gloo(strategy, kind, 1, there, values)
    assert there.is_dir() is (kind == "sharded")
    model, ours = here(AccelXLAStrategy(row), 2, tmp_path, there)
    assert difference(model, here("auto", 2, tmp_path / "cpu")[0]) < FLOAT32
    on_gloo(strategy, kind, 3, back, values, "--resume", ours)
    model.load_state_dict(torch.load(values, weights_only=True))
    through, _ = here("auto", 3, tmp_path / "cpu")
    assert difference(model, through) < FLOAT32
    on_devices, _ = here(AccelXLAStrategy(row), 4, tmp_path, back)
    assert difference(on_devices, here("auto", 4, tmp_path / "cpu")[0]) < FLOAT32


def test_within_an_epoch_the_samples_that_are_left_are_trained_with(tmp_path: Path) -> None:
    """Two batches of the first epoch on two ranks, up to the third of the second on the devices, the rest on ranks."""
    there, back, values = tmp_path / "there", tmp_path / "back", tmp_path / "values"
    on_gloo("accel_fsdp", "full", 2, tmp_path / "straight", values, "--dealt")
    straight, model = (litnet(schedule=True) for _ in range(2))
    straight.load_state_dict(torch.load(values, weights_only=True))
    on_gloo("accel_fsdp", "sharded", 1, there, values, "--dealt", "--after", 2)
    through, ours = here(AccelXLAStrategy("fsdp"), 2, tmp_path, there, after=elsewhere.BATCHES + 3)
    assert difference(through, straight) < FLOAT32
    on_gloo("accel_fsdp", "full", 2, back, values, "--dealt", "--resume", ours)
    model.load_state_dict(torch.load(values, weights_only=True))
    assert difference(model, straight) < FLOAT32
