"""``accel test``: what it says of the losses that the ranks report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from typer.testing import CliRunner, Result

from lightning_accel.cli import check
from lightning_accel.cli.main import app
from lightning_accel.launching.check import ROWS, train
from lightning_accel.launching.settings import LaunchSettings


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int], Result]:
    """Run the command among ranks that are not there, whose last losses are this much too large."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    alone = train(Fabric(accelerator="cpu", devices=1), torch.device("cpu"), 2, 0)

    def run(error: float, ranks: int) -> Result:
        def ranks_report(settings: LaunchSettings, script: str, arguments: list[str], **_: Any) -> None:
            assert (settings.num_processes, settings.cpu) == (2, True)
            losses = {**dict.fromkeys(ROWS, alone), "fsdp": [*alone[:-1], alone[-1] + error]}
            Path(arguments[0]).write_text(json.dumps({"losses": losses, "ranks": ranks, "device": "cpu"}))

        monkeypatch.setattr(check, "run", ranks_report)
        return CliRunner().invoke(app, ["test"])

    return run


def test_the_same(checked: Callable[[float, int], Result]) -> None:
    result = checked(1e-15, 2)
    assert (result.exit_code, result.output.count("ok"), result.output.count("WRONG")) == (0, 3, 0)


@pytest.mark.parametrize("error", [1e-8, float("nan")])
def test_another_loss(checked: Callable[[float, int], Result], error: float) -> None:
    result = checked(error, 2)
    assert (result.exit_code, result.output.count("ok"), result.output.count("WRONG")) == (1, 2, 1)


def test_ranks_that_trained_alone(checked: Callable[[float, int], Result]) -> None:
    assert checked(0.0, 1).exit_code == 1


def test_too_few_ranks() -> None:
    assert CliRunner().invoke(app, ["test", "--num-processes", "1"]).exit_code == 2
