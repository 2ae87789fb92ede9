"""``accel launch``: what is refused before anything starts, and scripts in ranks of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from launched import ROOT, accel
from typer.testing import CliRunner

from lightning_accel.cli.main import app

# A script of somebody who has never heard of this package.
LIGHTNING = """
import argparse, json, os, sys
import lightning.pytorch as pl
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--strategy")
    arguments = parser.parse_args()
    named = dict(accelerator="auto", devices="auto", strategy=arguments.strategy or "auto")  # as a LightningCLI does
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    pl.seed_everything(1)
    trainer = pl.Trainer(max_steps=3, **quiet, **named)
    trainer.fit(Model())
    with open(f"{arguments.out}/{trainer.global_rank}.json", "w") as file:
        row = getattr(trainer.strategy, "row", None)
        json.dump({
            "row": row and row.name, "world_size": trainer.world_size, "precision": trainer.precision,
            "accumulate": trainer.accumulate_grad_batches, "loss": trainer.callback_metrics["loss"].item(),
            "argv": sys.argv[1:], "threads": os.environ["OMP_NUM_THREADS"], "port": os.environ["MASTER_PORT"],
            "told": {name: value for name, value in os.environ.items() if name.startswith("ACCEL_")},
        }, file)
"""

# Both loops, with what the command line says alone.
BY_FILE = """
import json, sys
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_accel import Accelerator

class Model(BoringModel):
    def configure_optimizers(self):
        return None

if __name__ == "__main__":
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = pl.Trainer(max_steps=2, limit_val_batches=0, **quiet)
    trainer.fit(Model())
    optimizer = type(trainer.strategy.optimizers[0]).__name__
    accelerator = Accelerator()
    rows = [trainer.strategy.row.name, accelerator.fabric.strategy.row.name]
    accumulate = [trainer.accumulate_grad_batches, accelerator.gradient_accumulation_steps]
    with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
        json.dump({"rows": rows, "accumulate": accumulate, "optimizer": optimizer}, file)
"""

# Rank 1 is killed, and when all were started again it raises.
FAILING = """
import os, signal, time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
print(f"attempt {attempt}: {int(total)} ranks", flush=True)
if dist.get_rank() == 1:
    if attempt == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    raise LookupError("no more luck")
dist.barrier()
"""


WAITING = """
import os, sys, time
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
time.sleep(300)
"""


def refused(*arguments: str | Path) -> tuple[int, str]:
    """What a command says that is refused, in this process."""
    result = CliRunner().invoke(app, ["launch", *map(str, arguments)], terminal_width=200)
    assert isinstance(result.exception, SystemExit), "or there is a traceback"
    return result.exit_code, " ".join(result.output.split())


def script(folder: Path, text: str) -> Path:
    (folder / "script.py").write_text(text)
    return folder / "script.py"


def results(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture
def some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nowhere"))
    return script(tmp_path, "raise SystemExit('started')")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--strategy", "fdsp"], 1, "Error: Expected strategy to be one of accel_ddp"),
        (["--strategy", "fdsp"], 1, "got 'fdsp'. Did you mean fsdp?"),
        (["--mixed-precision", "fp61"], 1, "got 'fp61'. Did you mean fp16?"),
        (["--num-machines", "2"], 1, "Expected main_process_ip, the address of machine 0"),
        (["--num_processes", "two"], 2, "Invalid value for '--num_processes'"),
        (["--num_proceses", "2"], 2, "No such option: --num_proceses"),
        (["--gpu_ids", "9"], 1, "Expected gpu_ids to name GPUs of this machine"),
        (["--config_file", "nowhere.yaml"], 1, "No such file or directory: 'nowhere.yaml'"),
    ],
)
def test_bad_options(some: Path, options: Sequence[str], code: int, message: str) -> None:
    found, said = refused(*options, some)
    assert (found, message in said) == (code, True), said


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, [], "Expected config to be a DeepSpeed JSON file, got"),
        ('{"zero_optimization":\n  {"stage": 2,}}', [], "ds.json, got an error at line 2, column"),
        ('{"zero_optimisation": {}}', [], "(did you mean 'zero_optimization'?)"),
        ("{}", ["--strategy", "fsdp"], "Expected strategy or deepspeed_config, which says it, got both"),
        (
            '{"train_batch_size": 33, "train_micro_batch_size_per_gpu": 17}',
            ["--num_processes", "2", "--cpu"],
            "17 × 1 × 2 = 34",
        ),
    ],
)
def test_bad_files_of_deepspeed(some: Path, text: str | None, options: Sequence[str], message: str) -> None:
    path = some.parent / "ds.json"
    if text is not None:
        path.write_text(text)
    code, said = refused("--deepspeed_config_file", path, *options, some)
    assert (code, message in said) == (1, True), said
    assert "started" not in said


@pytest.mark.matrix
def test_a_file_of_deepspeed_reaches_both_loops(tmp_path: Path) -> None:
    """An Accelerator and a Trainer take it; the Trainer's model leaves the optimizer to it."""
    file = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2, "optimizer": {"type": "SGD"}}
    (tmp_path / "ds.json").write_text(json.dumps(file))
    path = script(tmp_path, BY_FILE)
    options = ["--num_processes", "2", "--cpu", "--deepspeed_config", tmp_path / "ds.json"]
    result = accel("launch", *options, path, str(tmp_path))
    assert result.returncode == 0, result.stderr
    for found in results(tmp_path, 2):
        assert found == {"rows": ["zero1", "zero1"], "accumulate": [2, 2], "optimizer": "SGD"}


def test_bad_scripts(some: Path) -> None:
    assert "Expected a Python file at nowhere.py, found nothing." in refused("nowhere.py")[1]
    assert f"Expected a Python file, got the folder {some.parent}." in refused(some.parent)[1]
    (some.parent / "app.pyc").write_bytes(b"")
    assert (
        f"Expected Python's source in {some.parent}/app.pyc, got what is compiled."
        in refused(some.parent / "app.pyc")[1]
    )
    with zipfile.ZipFile(some.parent / "app.zip", "w") as file:
        file.writestr("__main__.py", "")
    assert (
        f"Expected Python's source in {some.parent}/app.zip, got what is zipped." in refused(some.parent / "app.zip")[1]
    )
    assert "Missing argument 'SCRIPT'" in refused()[1]


def test_a_port_in_use(some: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        code, said = refused("--main_process_port", port, some)
    assert (code, f"Expected main_process_port {port} to be free, but another program uses it." in said) == (1, True)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ("0", "Expected 2 machines within 0.5 seconds, but machine 1 of 0 to 1 has not come"),
        ("1", "Expected machine 0 to be at 127.0.0.1 port"),
    ],
)
def test_a_machine_that_never_comes(some: Path, rank: str, message: str) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    options = ["--num_machines", "2", "--machine-rank", rank, "--main_process_ip", "127.0.0.1", "--cpu"]
    code, said = refused(*options, "--main_process_port", port, "--join_timeout", "0.5", some)
    assert (code, message in said) == (1, True), said


def test_help() -> None:
    result = CliRunner().invoke(app, ["launch", "--help"], terminal_width=200)
    assert result.exit_code == 0
    for option in ("--num_processes", "--machine_rank", "--gpu_ids", "--strategy", "--config_file", "--max_restarts"):
        assert option in result.output


def test_an_unmodified_lightning_script(tmp_path: Path) -> None:
    (tmp_path / "accelerate.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 4\nmixed_precision: no\n")
    options = ["--config-file", tmp_path / "accelerate.yaml", "--num-processes", "2", "--strategy", "zero2"]
    options += ["--mixed_precision", "bf16", "--gradient_accumulation_steps", "2"]
    done = accel("launch", *options, script(tmp_path, LIGHTNING), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = results(tmp_path, 2)
    assert first["argv"] == ["--out", str(tmp_path)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert first["threads"] == str(max(cores // 2, 1))
    expected = {"row": "zero2", "world_size": 2, "precision": "bf16-mixed", "accumulate": 2}
    assert {name: first[name] for name in expected} == expected
    assert first["loss"] == second["loss"]
    assert first["told"] == {
        "ACCEL_STRATEGY": "accel_zero2",
        "ACCEL_MIXED_PRECISION": "bf16",
        "ACCEL_CPU": "1",
        "ACCEL_GRADIENT_ACCUMULATION_STEPS": "2",
    }


@pytest.mark.matrix
def test_ranks_that_fail_are_started_again_and_then_explained(tmp_path: Path) -> None:
    path = script(tmp_path, FAILING)
    begin = time.monotonic()
    done = accel("launch", "--num_processes", "2", "--cpu", "--max_restarts", "1", path)
    assert time.monotonic() - begin < 90
    assert done.returncode == 1, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", *["attempt 0: 2 ranks"] * 2, *["attempt 1: 2 ranks"] * 2]
    *_, error = done.stderr.partition("Error: Rank 1")
    assert re.match(r" failed( \(1 more on this machine followed\))?: LookupError: no more luck\n", error), done.stderr
    own = f'Traceback (most recent call last):\n  File "{path}", line 14, in <module>\n'
    assert own in error
    assert error.rstrip().endswith("LookupError: no more luck")


@pytest.mark.matrix
def test_a_strategy_that_the_script_names_itself(tmp_path: Path) -> None:
    path = script(tmp_path, LIGHTNING)
    # What the script says goes before what accel launch does.
    options = ["--num_processes", "2", "--cpu", "--strategy", "ddp"]
    done = accel("launch", *options, path, "--out", tmp_path, "--strategy", "accel_fsdp")
    assert done.returncode == 0, done.stderr
    assert [(each["row"], each["world_size"]) for each in results(tmp_path, 2)] == [("fsdp", 2)] * 2


@pytest.mark.matrix
def test_a_module_and_a_signal(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text("import os, sys\nprint(__package__, *sys.argv[1:])\nos.abort()\n")
    done = accel("launch", "-m", "package.train", "--x", "1", PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    assert done.stdout == "package --x 1\n"
    assert done.returncode == 134
    assert "Rank 0 failed: it was killed by SIGABRT" in done.stderr


def written(path: Path) -> int:
    end = time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return int(path.read_text())


def state(process: int) -> str:
    """One letter of Linux's; empty if it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


@pytest.mark.matrix
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells ranks of their launcher's end on Linux alone")
def test_a_launcher_that_is_hung_up_on_and_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_accel.cli", "launch", "--cpu", str(script(tmp_path, WAITING))]
    launcher = subprocess.Popen(
        [*command, str(tmp_path / "rank")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": "/nowhere"},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # nohup
    )
    try:
        rank = written(tmp_path / "rank")
        launcher.send_signal(signal.SIGHUP)
        time.sleep(2)
        assert launcher.poll() is None
        assert state(rank) not in ("", "Z")
        launcher.kill()
        launcher.wait()
        end = time.monotonic() + 10
        while state(rank) not in ("", "Z") and time.monotonic() < end:
            time.sleep(0.05)
        assert state(rank) in ("", "Z")
    finally:
        launcher.kill()
        launcher.wait()
