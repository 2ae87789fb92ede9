"""Every example, run as a user runs it, under every strategy."""

import csv
import importlib
import os
import re
import signal
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from opened import opened

ROOT = Path(__file__).parents[2]
MODEL = ("--dim", "32", "--layers", "2", "--heads", "2", "--generate", "8")
DATA = ("--batch-size", "2", "--block-size", "32", "--validation-tokens", "512")
# A warm-up that does not end: what a step does must not depend on how many follow, as it would under a cosine.
RESUMED = (*MODEL[:-2], *DATA[2:], "--accumulate", "2", "--val-every", "3", "--warmup", "100", "--lr", "0.05")
LM = (*MODEL, *DATA, "--lr", "0.05", "--warmup", "100", "--accumulate", "2", "--val-every", "3")


class Run(NamedTuple):
    """What a script printed and where it wrote."""

    output: str
    out: Path

    @property
    def curve(self) -> list[dict[str, str]]:
        with (self.out / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def column(self, name: str) -> dict[int, float]:
        return {int(row["step"]): float(row[name]) for row in self.curve if row[name]}

    def held(self, kind: str) -> list[int]:
        """Bytes of a kind of model state, rank by rank."""
        found = re.findall(rf"^rank \d holds .*(?:: |, ){kind} ([\d,]+) B", self.output, re.MULTILINE)
        return [int(number.replace(",", "")) for number in found]


def run(script: str, out: Path, *arguments: str) -> Run:
    """Run an example on two CPU ranks; a failure shows all it printed."""
    own = () if script == "resume_anywhere.py" else ("--accelerator", "cpu")
    command = [sys.executable, str(ROOT / "examples" / script), *own, "--out", str(out), *arguments]
    # A session of its own, so that the second rank, which the first one starts, ends with it.
    process = subprocess.Popen(
        command,
        cwd=out.parent,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output
    return Run(output, out)


class Runs:
    """Runs, each started when a test first asks for it: they take seconds, and several tests look at each.

    The language model is trained three times with the Trainer and twice with Fabric, and all must show one curve:
    four steps under DDP, continued to the sixth under ZeRO-1, and six steps at a stretch under ZeRO-2.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def ddp(self) -> Run:
        return run("train_lm.py", self.folder / "ddp", "--strategy", "accel_ddp", "--max-steps", "4", *LM)

    @cached_property
    def zero1(self) -> Run:
        resume = ("--resume", str(self.ddp.out / "checkpoints" / "last.ckpt"))
        return run("train_lm.py", self.folder / "zero1", "--strategy", "accel_zero1", "--max-steps", "6", *LM, *resume)

    @cached_property
    def zero2(self) -> Run:
        return run("train_lm.py", self.folder / "zero2", "--strategy", "accel_zero2", "--max-steps", "6", *LM)

    @cached_property
    def loop(self) -> Run:
        return run("fabric_loop.py", self.folder / "loop", "--strategy", "accel_zero2", "--max-steps", "4", *LM)

    @cached_property
    def resumed_loop(self) -> Run:
        out = self.loop.out
        return run("fabric_loop.py", out, "--strategy", "accel_zero1", "--max-steps", "6", *LM, "--resume")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize("name", [*(pytest.param(row, marks=pytest.mark.matrix) for row in ("ddp", "zero1")), "zero2"])
def test_train_lm_reports_and_leaves_everything(runs: Runs, name: str) -> None:
    result: Run = getattr(runs, name)

    last = 4 if name == "ddp" else 6
    assert re.search(rf"validation loss 5\.\d+ at step 0 -> \d\.\d+ at step {last} ", result.output)
    assert re.search(r"throughput [1-9][\d,]* tokens/s", result.output)
    assert f"accel_{name}, rank 0 of 2" in result.output
    assert "sample ---" in result.output
    assert "def " in result.output
    assert result.output.count("throughput") == 1, "only rank 0 may print"
    assert (result.out / "curve.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = opened(result.out / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == last


@pytest.mark.matrix
def test_the_ranks_of_zero_share_what_those_of_ddp_repeat(runs: Runs) -> None:
    ddp, zero1, zero2 = runs.ddp, runs.zero1, runs.zero2

    assert len(set(ddp.held("parameters") + zero1.held("parameters") + zero2.held("parameters"))) == 1
    assert ddp.held("gradients") == zero1.held("gradients")
    assert sum(zero2.held("gradients")) == pytest.approx(ddp.held("gradients")[0], rel=0.01)
    for zero in (zero1, zero2):
        assert sum(zero.held("optimizer state")) == pytest.approx(ddp.held("optimizer state")[0], rel=0.01)


@pytest.mark.matrix
def test_resuming_continues_the_curve_under_another_strategy(runs: Runs) -> None:
    assert "resumed at step 4" in runs.zero1.output

    resumed, straight = runs.zero1.column("train_loss"), runs.zero2.column("train_loss")
    assert list(resumed) == [1, 2, 3, 4, 5, 6]
    assert resumed == pytest.approx(straight, abs=1e-4)
    assert {step: resumed[step] for step in (1, 2, 3, 4)} == runs.ddp.column("train_loss")
    assert straight[6] < straight[1] - 0.05, "the model must learn, or equal losses mean nothing"
    assert runs.zero1.column("tokens") == runs.zero2.column("tokens")
    assert list(runs.zero1.column("val_loss")) == [0, 3, 4, 6]
    assert runs.zero1.column("val_loss")[6] == pytest.approx(runs.zero2.column("val_loss")[6], abs=1e-4)


@pytest.mark.matrix
def test_a_run_resumes_anywhere(tmp_path: Path) -> None:
    out = tmp_path / "anywhere"
    given = run("resume_anywhere.py", out, "--steps", "4", "--", "--accelerator", "cpu", *RESUMED)
    distance = re.search(r"never further than (\S+) from the run that was not stopped", given.output)
    assert distance is not None
    # Losses near 5.5 in float32, whose units are 5e-7 there; other samples change them by 0.01 and more.
    assert float(distance[1]) < 1e-5
    assert given.output.count("resumed at step") == 2
    assert (out / "curve.png").stat().st_size > 10_000


@pytest.mark.matrix
def test_the_fabric_loop_draws_the_curve_of_the_trainer(runs: Runs) -> None:
    assert "sample ---" in runs.loop.output
    assert len(runs.loop.held("optimizer state")) == 2
    assert runs.loop.column("train_loss") == pytest.approx(
        {step: loss for step, loss in runs.zero2.column("train_loss").items() if step <= 4}, abs=1e-4
    )


@pytest.mark.matrix
def test_the_fabric_loop_resumes_under_another_strategy(runs: Runs) -> None:
    result = runs.resumed_loop

    assert "resumed at step 4" in result.output
    assert "accel_zero1, rank 0 of 2" in result.output
    assert result.column("train_loss") == pytest.approx(runs.zero2.column("train_loss"), abs=1e-4)
    assert list(result.column("val_loss")) == [0, 3, 4, 6]
    assert (result.out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (result.out / "last.ckpt").exists()


@pytest.mark.matrix
def test_the_digits_are_learnt(tmp_path: Path) -> None:
    # Three epochs reach 96 to 98 %, ten times what guessing does.
    arguments = ("--strategy", "accel_zero1", "--max-epochs", "3", "--min-accuracy", "0.9")

    result = run("train_digits.py", tmp_path / "out", *arguments)

    assert re.search(r"^test accuracy 0\.9\d+ after 3 epochs with accel_zero1$", result.output, re.MULTILINE)


@pytest.mark.matrix
def test_the_gan_learns_to_draw(tmp_path: Path) -> None:
    result = run("gan.py", tmp_path / "out", "--strategy", "accel_fsdp", "--max-epochs", "10")

    before, after = (
        float(re.search(rf"^{when}: distance (\d+\.\d+), \d+ of 10 digits$", result.output, re.MULTILINE)[1])
        for when in ("before", "after")
    )
    # Real images among themselves are at 0.2; 10 epochs lead from 5.9 to below 4, 100 to below 1.
    assert after < 0.8 * before
    assert "accel_fsdp, rank 0 of 2" in result.output
    assert result.output.count("wrote samples.png") == 1, "only rank 0 may print"
    assert (result.out / "samples.png").read_bytes().startswith(b"\x89PNG")
    # Two Adams, each rank with half of both: two moments a parameter, step counters, padding.
    assert sum(result.held("optimizer state")) == pytest.approx(2 * sum(result.held("parameters")), rel=0.01)


@pytest.mark.matrix
def test_lora_trains_and_saves_adapters_only(tmp_path: Path) -> None:
    arguments = ("--max-steps", "6", "--batch-size", "8", "--held-out", "64", "--lr", "0.001")

    result = run("finetune_lora.py", tmp_path / "out", "--strategy", "accel_fsdp", *arguments)

    found = re.search(r"reciprocal rank: (0\.\d+) by MiniLM -> (0\.\d+) with adapters", result.output)
    before, after = map(float, found.groups())
    # Guessing among 64 gives 0.07. Six steps on eight pairs a rank improve little, but must not undo what was learnt.
    assert before > 0.5
    assert after > before - 0.05
    assert after != before
    for rank in range(2):
        assert result.held("gradients")[rank] < result.held("frozen parameters")[rank] / 50
        assert result.held("gradients")[rank] == result.held("parameters")[rank]
        assert result.held("optimizer state")[rank] < 2.01 * result.held("gradients")[rank]
    adapters = load_file(result.out / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapters)
    changed = [name for name, tensor in adapters.items() if "lora_B" in name and tensor.any()]
    assert len(changed) == len(adapters) / 2, "they start as zeros, and all are trained"
    assert sum(tensor.nbytes for tensor in adapters.values()) == sum(result.held("parameters"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "accel_zero9"], "unknown strategy 'accel_zero9'; choose from accel_ddp, accel_zero2, auto"),
        (["--dim", "100"], "--dim must be a multiple of twice --heads, got --dim 100 and --heads 4"),
        (["--heads", "0"], "expected a whole number above 0, got '0'"),
        (["--clip", "inf"], "expected a number that is 0 or above, got 'inf'"),
        (["--tokenizer", "bpe", "--vocab-size", "256"], "--vocab-size must be above 256 (the bytes)"),
        (["--resume", "--out", "nowhere"], "there is no checkpoint nowhere/last.ckpt"),
        (["--resume", "{checkpoint}", "--dim", "64"], "--dim is 64, but {checkpoint} has a model with 32"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    common = importlib.import_module("common")
    checkpoint = tmp_path / "last.ckpt"
    torch.save({"hyper_parameters": {"dim": 32}}, checkpoint)
    monkeypatch.setattr(sys, "argv", ["train_lm.py", *(word.format(checkpoint=checkpoint) for word in arguments)])
    parser = common.language_model_parser("A test.", ["accel_ddp", "accel_zero2"], str(tmp_path))

    with pytest.raises(SystemExit) as exit_:
        common.parse_language_model(parser, "last.ckpt")

    assert exit_.value.code == 2
    assert message.format(checkpoint=checkpoint) in capsys.readouterr().err
