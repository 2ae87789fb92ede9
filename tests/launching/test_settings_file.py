"""Settings in files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_accel.launching import settings_file
from lightning_accel.launching.settings import LaunchSettings
from lightning_accel.launching.settings_file import default_path, read, write

ALL = LaunchSettings(
    num_processes=8,
    num_machines=2,
    machine_rank=1,
    main_process_ip="10.0.0.1",
    main_process_port=29_501,
    gpu_ids="0,1,2,3",
    mixed_precision="no",
    strategy="accel_zero2",
    gradient_accumulation_steps=4,
    gradient_clipping=0.5,
    num_cpu_threads_per_process=3,
    max_restarts=2,
    join_timeout=60.0,
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "lightning_accel"


@pytest.mark.parametrize("settings", [ALL, LaunchSettings(cpu=True), LaunchSettings()], ids=["all", "cpu", "none"])
def test_what_is_written_is_read(home: Path, settings: LaunchSettings) -> None:
    assert write(settings) == home / "default.yaml" == default_path()
    assert read().settings == read(home / "default.yaml").settings == settings
    assert read().path == home / "default.yaml"
    assert [file.name for file in home.iterdir()] == ["default.yaml"]


def test_without_a_file(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (read().settings, read().path) == (LaunchSettings(), None)
    with pytest.raises(FileNotFoundError):
        read(home / "named.yaml")
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".config/lightning_accel/default.yaml"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"Expected a YAML file with settings, got '.*', which is a folder"):
        read(tmp_path)


def test_a_write_that_fails_changes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(ALL)

    def full(descriptor: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(settings_file.os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        write(LaunchSettings())
    assert read().settings == ALL
    assert os.listdir(home) == ["default.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_procs: 2", "got 'num_procs' (did you mean 'num_processes'?)"),
        ("num_processes: two", "a.yaml: Expected num_processes to be a whole number of 1 or more, got 'two'"),
        ("mixed_precision: no", "Expected mixed_precision to be one of no, fp16, bf16, fp8, got False"),
        ("- 1\n- 2", "Expected names and values in"),
        ("a: [1", "Expected a YAML file at"),
        ("!!python/object/apply:os.getcwd []", "Expected a YAML file at"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        read(tmp_path / "a.yaml")
    assert message in str(caught.value)
