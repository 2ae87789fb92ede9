"""The scripts for Accelerate's users, launched as they would launch them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate_style"
pytestmark = pytest.mark.matrix
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)


def launch(script: Path, *arguments: str, options: tuple[str, ...] = ()) -> str:
    """What a script prints under ``accel launch`` on two CPU ranks."""
    command = [sys.executable, "-m", "lightning_accel.cli", "launch", "--cpu", "--num_processes", "2", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, str(script), *arguments], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracies(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"accuracy (\d\.\d+)", output)]


def with_accelerate(script: str, folder: Path) -> Path:
    """A copy whose import line says Accelerate."""
    text = (FOLDER / script).read_text()
    assert text.count("from lightning_accel import") == 1
    copy = folder / script
    copy.write_text(text.replace("from lightning_accel import", "from accelerate import"))
    return copy


def test_a_cnn_goes_on_under_another_strategy(tmp_path: Path) -> None:
    script, out = FOLDER / "cnn.py", ("--out", str(tmp_path))
    first = launch(script, *out, "--epochs", "1", options=("--strategy", "zero2", "--mixed_precision", "bf16"))
    later = launch(script, *out, "--epochs", "2", "--resume", options=("--strategy", "ddp"))
    assert first.count("of 359 images") == 1  # those that fill up the last batch do not count
    assert later.startswith("epoch 1: ")
    assert accuracies(later)[-1] > 0.85


def test_a_text_classifier() -> None:
    output = launch(FOLDER / "text_classifier.py", "--epochs", "1", "--max-steps", "20", options=("--strategy", "fsdp"))
    # The most frequent of eight packages is a fifth of all.
    assert accuracies(output)[-1] > 0.35
    assert int(re.findall(r"of (\d+) docstrings", output)[0]) > 200


def test_the_same_as_a_lightning_module() -> None:
    command = [sys.executable, str(FOLDER / "lit_cnn.py"), "--strategy", "accel_zero2", "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, start_new_session=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert accuracies(done.stdout)[-1] > 0.85


@needs_accelerate
def test_with_accelerate_but_for_the_import_line(tmp_path: Path) -> None:
    output = launch(with_accelerate("cnn.py", tmp_path), "--epochs", "2", "--out", str(tmp_path / "out"))
    assert accuracies(output)[-1] > 0.85
    assert output.count("of 359 images") == 2


@needs_accelerate
def test_hugging_faces_trainer(tmp_path: Path) -> None:
    output = launch(FOLDER / "hf_trainer.py", "--out", str(tmp_path), "--epochs", "2")
    assert "on 2 ranks" in output
    assert accuracies(output)[-1] > 0.85
