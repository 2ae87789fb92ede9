"""``accel plan``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lightning_accel.cli.main import app

ROOT = Path(__file__).parent.parent.parent
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x):
        return self.blocks(x).mean()

def with_batch():
    return Net(), torch.empty(4, 8)

number = 3
"""
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(MODEL)
    return tmp_path / "nets.py"


def accel_plan(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_table_and_a_picture(file: Path, tmp_path: Path) -> None:
    code, out = accel_plan(f"{file}:with_batch", "--ranks", 4, "--memory", "1MB", "--png", tmp_path / "plan.png")
    assert code == 0
    assert "Net: 144 parameters, bf16-mixed, 4 ranks; bytes per rank" in out
    assert out.count("checkpointing") == 5
    assert "* accel_" in out
    assert (tmp_path / "plan.png").stat().st_size > 0


def test_plain_data_of_what_was_asked_for(file: Path) -> None:
    settings = ["--row", "zero2", "--row", "fsdp", "--no-checkpointing", "--optimizer", "SGD", "--precision", "32-true"]
    code, out = accel_plan(f"{file}:Net", "--batch", "4x8", "--json", *settings)
    assert code == 0
    found = json.loads(out)
    assert [row["row"] for row in found["rows"]] == ["zero2", "fsdp"]
    assert found["rows"][0]["at_rest"]["optimizer_state"] == 0


def test_nothing_fits(file: Path) -> None:
    code, out = accel_plan(f"{file}:with_batch", "--memory", "10B")
    assert code == 1
    assert "! No row fits 10 B:" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{file}:Net"], "Expected a batch, got none. Give --batch"),
        (["{file}:with_batch", "--batch", "4x8"], "Expected one batch, got --batch 4x8 and another"),
        (["{file}:Net", "--batch", "4xx"], "Expected a shape such as 8x32"),
        (["{file}:Net", "--batch", "4x8:words"], "Expected a shape such as 8x32"),
        (["{file}:nothing", "--batch", "4x8"], "to exist: module 'nets' has no attribute 'nothing'"),
        (["{file}:number", "--batch", "4x8"], "to be a callable, got int"),
        (["nowhere.py:Net"], "Expected nowhere.py:Net to exist: there is no file nowhere.py"),
        (["no_such_package:Net"], "to exist: No module named 'no_such_package'"),
        (["Net"], "Expected package.module:name, file.py:name or hf:path"),
        (["{file}:with_batch", "--optimizer", "Best"], "Expected a class of torch.optim, such as AdamW"),
        (["hf:nowhere"], "Expected the config.json of a Hugging Face model, or its folder"),
        (["{file}:with_batch", "--shard-size", "3"], "to divide the number of ranks, got 3 for 8"),
    ],
)
def test_bad_input(file: Path, arguments: list[str], message: str) -> None:
    code, out = accel_plan(*(argument.format(file=file) for argument in arguments))
    assert code == 1
    assert message in " ".join(out.split())


def test_help() -> None:
    code, out = accel_plan("--help")
    assert code == 0
    for option in ("--ranks", "--memory", "--precision", "--batch", "--png", "--checkpointing"):
        assert option in out


MEASURED = """
import atexit, pathlib, re, sys
from lightning_accel.cli.main import main

@atexit.register
def tell():
    status = pathlib.Path("/proc/self/status").read_text()
    print("peak KiB:", re.search(r"VmHWM:\\s+(\\d+) kB", status)[1], file=sys.stderr)

main()
"""


@pytest.mark.matrix
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status, which Linux has")
def test_llama_7b_within_two_gigabytes_of_host_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    command = [sys.executable, "-c", MEASURED, "plan", f"hf:{tmp_path}", "--memory", "80GB", "--json"]
    command += ["--row", "ddp", "--row", "fsdp", "--no-checkpointing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.rpartition("peak KiB:")[2]) < 2 * 2**20
    found = json.loads(done.stdout)
    assert found["parameters"] == 6_738_415_616
    assert found["best"] == {"row": "fsdp", "checkpointing": False}
    ddp, fsdp = found["rows"]
    assert ddp["rest_bytes"] == pytest.approx(16 * found["parameters"], rel=0.01)
    assert fsdp["rest_bytes"] < ddp["rest_bytes"] / 7
