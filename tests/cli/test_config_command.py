"""``accel config``, ``accel env`` and ``accel bench``, in this process."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lightning_accel.cli.main import app
from lightning_accel.launching.settings import LaunchSettings
from lightning_accel.launching.settings_file import default_path, read, write


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def accel(*arguments: str | Path, answers: list[str] | None = None) -> Result:
    given = None if answers is None else "\n".join(answers) + "\n"
    result = CliRunner().invoke(app, [*map(str, arguments)], input=given, terminal_width=200)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_defaults_are_written_once() -> None:
    assert accel("config", "--default").output == f"Written: {default_path()}\n"
    assert read().settings == LaunchSettings(cpu=True)  # not the ranks: a machine may get more GPUs
    again = accel("config", "--default")
    assert again.exit_code == 1
    assert f"Expected nothing at {default_path()}, found a file. Use --overwrite to replace it." in again.stderr
    assert accel("config", "--default", "--overwrite").exit_code == 0


def test_answers_are_checked_at_once() -> None:
    # machines, cpu, ranks (twice), DeepSpeed's file, strategy (twice), precision, accumulation, restarts
    answers = ["1", "y", "nowhere.json", "", "0", "3", "fdsp", "fsdp", "bf16", "4", "2"]
    result = accel("config", answers=answers)
    assert result.exit_code == 0, result.output
    assert "Expected num_processes to be a whole number of 1 or more, got 0." in result.output
    assert "Expected config to be a DeepSpeed JSON file, got 'nowhere.json': there is none." in result.output
    assert "got 'fdsp'. Did you mean fsdp?" in result.output
    assert read().settings == LaunchSettings(
        num_processes=3,
        cpu=True,
        strategy="accel_fsdp",
        mixed_precision="bf16",
        gradient_accumulation_steps=4,
        max_restarts=2,
    )


def test_what_is_there_is_offered() -> None:
    settings = LaunchSettings(num_processes=6, cpu=True, strategy="accel_zero1", gradient_clipping=2.0)
    write(settings)
    assert accel("config", answers=[""] * 8).exit_code == 0
    assert read().settings == LaunchSettings(**{**settings.changed(), "max_restarts": 0})


def test_several_machines(tmp_path: Path) -> None:
    # machines (twice), address, rank (twice), port, cpu, no file of DeepSpeed's, ranks, and nothing else
    answers = ["some", "2", "10.0.0.1", "2", "1", "29501", "y", "", "8", "", "", "", ""]
    result = accel("config", "--config-file", tmp_path / "own.yaml", answers=answers)
    assert result.exit_code == 0, result.output
    assert "Expected a whole number, got 'some'." in result.output
    assert "Expected machine_rank to be one of 0 to 1, got 2" in result.output
    assert read(tmp_path / "own.yaml").settings == LaunchSettings(
        num_processes=8,
        num_machines=2,
        machine_rank=1,
        main_process_ip="10.0.0.1",
        main_process_port=29_501,
        cpu=True,
    )


def test_a_file_of_deepspeed_says_the_strategy(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    write(LaunchSettings(num_processes=2, cpu=True, strategy="accel_fsdp"))
    result = accel("config", answers=["", "", str(tmp_path / "ds.json"), "", "", "", ""])
    assert result.exit_code == 0, result.output
    assert "Strategy, such as" not in result.output
    assert read().settings == LaunchSettings(num_processes=2, cpu=True, deepspeed_config=str(tmp_path / "ds.json"))


def test_questions_that_are_not_answered_write_nothing() -> None:
    assert accel("config", answers=["1"]).exit_code == 1
    assert not default_path().exists()


def test_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    for name in ("SECRET", "TORCH_SECRET", "LT_TOKEN", "RANK_TOKEN", "MASTER_KEY", "OMP_KEY"):
        monkeypatch.setenv(name, "never shown")
    (tmp_path / "a.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 2\ndowncast_bf16: true\n")
    result = accel("env", "--config-file", tmp_path / "a.yaml")
    assert result.exit_code == 0
    rows = [" ".join(line.split()) for line in result.output.splitlines()]
    for row in (f"torch {version('torch')}", "GPUs 0", "NCCL_DEBUG INFO", "num_processes 2", "strategy accel_ddp"):
        assert row in rows, result.output
    assert "not taken over downcast_bf16=True" in result.output.replace("  ", " ").replace("  ", " ")
    assert "never shown" not in result.output
    assert f"the defaults; there is no {default_path()}" in accel("env").output


def test_env_with_a_file_that_cannot_be_read() -> None:
    default_path().parent.mkdir(parents=True)
    default_path().write_text("num_procs: 2\n")
    result = accel("env")
    assert result.exit_code == 1
    assert version("torch") in result.output
    assert "'num_procs' (did you mean 'num_processes'?)" in result.output


def test_a_file_that_cannot_be_read_is_replaced() -> None:
    default_path().parent.mkdir(parents=True)
    default_path().write_text("num_procs: 2\n")
    result = accel("config", answers=["1", "y", "", "3", "", "", "", ""])
    assert result.exit_code == 0, result.output
    assert "What you answer replaces the file." in result.output
    assert read().settings == LaunchSettings(num_processes=3, cpu=True)


def test_bench_outside_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_accel.__file__", str(tmp_path / "site-packages/lightning_accel/__init__.py"))
    result = accel("bench", "--quick")
    assert result.exit_code == 1
    assert "Run this command in a checkout of lightning-accel" in result.stderr


@pytest.mark.parametrize("command", ["config", "env", "test", "bench"])
def test_help(command: str) -> None:
    assert command in accel("--help").output
    assert accel(command, "--help").exit_code == 0
