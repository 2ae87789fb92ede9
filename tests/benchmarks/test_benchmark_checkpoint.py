"""`python -m benchmarks.checkpoint` on a tiny model. Times are never asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.matrix
def test_all_contestants_save_and_load(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("results")
    command = [
        sys.executable,
        "-m",
        "benchmarks.checkpoint",
        "--models",
        "gpt-tiny",
        "--rounds",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()[2:9]}
    assert {"torch_save", "accel_fsdp", "accel_zero2", "torch_fsdp2_dcp", "lightning_full", "accel_full"} <= set(lines)
    # Each rank writes its half of parameters and two moments, which are 1.6 MB; whole checkpoints are rank 0's.
    assert lines["accel_fsdp"].split()[-2:] == ["0.9", "0.9"]
    assert lines["accel_full"].split()[-2:] == ["1.7", "0.0"]
    assert not list(tmp_path.iterdir())
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.jsonl", "checkpoint.md"]
