"""The commands around ``accel launch``, as a user runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from launched import accel


def test_config_and_bad_input(tmp_path: Path) -> None:
    (tmp_path / "lightning_accel").mkdir()
    (tmp_path / "lightning_accel/default.yaml").write_text("num_procs: 2\n")
    done = accel("env", XDG_CONFIG_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == ""
    assert "Error: Expected settings of accel launch in" in done.stdout
    assert "'num_procs' (did you mean 'num_processes'?)" in done.stdout


@pytest.mark.matrix
def test_two_ranks_of_this_machine() -> None:
    done = accel("test", "--cpu")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "accel_" in line]
    assert [line.split("│")[1].strip() for line in lines] == ["accel_ddp", "accel_zero2", "accel_fsdp"]
    assert all("ok" in line for line in lines)


@pytest.mark.matrix
def test_config_env_and_bench(tmp_path: Path) -> None:
    home = str(tmp_path)
    done = accel("config", "--default", XDG_CONFIG_HOME=home)
    assert (done.returncode, done.stdout) == (0, f"Written: {tmp_path}/lightning_accel/default.yaml\n")
    assert f"{tmp_path}/lightning_accel/default.yaml" in accel("env", XDG_CONFIG_HOME=home).stdout
    done = accel("bench", "--list")
    assert done.returncode == 0
    assert "accel_zero2" in done.stdout
    run = ["--model", "gpt-tiny", "--peers", "single", "--ranks", "1", "--rounds", "1", "--steps", "1"]
    done = accel("bench", *run, "--out", str(tmp_path / "measured"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| single |" in (tmp_path / "measured" / "table.md").read_text()
