"""The commands, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lightning_accel.cli.main import app

STATE = {"model.weight": torch.ones(4, 3), "model.bias": torch.zeros(4), "other": torch.zeros(1)}


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    torch.save({"state_dict": STATE}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def accel(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], terminal_width=200)


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_help(command: str) -> None:
    overview, details = accel("--help"), accel(command, "--help")
    assert overview.exit_code == details.exit_code == 0
    assert command in overview.output
    assert "--no-weights-only" in details.output
    assert "accel convert" in details.output


def test_options_arrive(ckpt: Path, tmp_path: Path) -> None:
    options = ["--to", "safetensors", "--prefix", "model.", "--max-shard-size", "48B"]
    result = accel("convert", ckpt, tmp_path / "hf", *options)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 2
    assert "Left out: 1 entries of the model whose names do not begin with 'model.'" in result.output
    assert accel("convert", ckpt, tmp_path / "hf", *options).exit_code == 1
    assert accel("convert", ckpt, tmp_path / "hf", *options, "--overwrite").exit_code == 0


def test_what_is_trusted_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "path": Path("x")}, tmp_path / "last.ckpt")
    result = accel("inspect", tmp_path / "last.ckpt")
    assert result.exit_code == 1
    assert "asks for pathlib" in result.stderr
    assert "--no-weights-only" in result.stderr
    assert accel("inspect", tmp_path / "last.ckpt", "--no-weights-only").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "missing.ckpt"], 1, "Error: Expected a checkpoint at missing.ckpt, found nothing.\n"),
        (["convert", "a.ckpt"], 2, "Missing argument 'DST'"),
    ],
)
def test_errors_are_messages(arguments: list[str], code: int, message: str) -> None:
    result = accel(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit), "or there is a traceback"


def test_a_target_that_is_none_is_wrong_usage(ckpt: Path) -> None:
    result = accel("convert", ckpt, "out", "--to", "onnx")
    assert result.exit_code == 2
    assert "'onnx' is not one of" in result.stderr


def test_brackets_in_names_are_no_markup(tmp_path: Path) -> None:
    torch.save({"[bold]": torch.ones(2)}, tmp_path / "[red]a.ckpt")
    result = accel("inspect", tmp_path / "[red]a.ckpt")
    assert "[red]a.ckpt" in result.output
    assert "[bold]" in result.output
    result = accel("convert", tmp_path / "[red]a.ckpt", tmp_path / "[b].ckpt")
    assert "[red]a.ckpt (file of torch.save)" in result.output
    result = accel("inspect", tmp_path / "[red]b.ckpt")
    assert "[red]b.ckpt" in result.stderr
