"""The command itself, in a process of its own if it starts any. Times are never asserted."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.cli import main
from benchmarks.config import Config
from benchmarks.crew import Crew, RankFailed
from benchmarks.peers import Spec

ROOT = Path(__file__).parents[2]
Peers = dict[str, dict[str, Any]]
PARAMETERS = 134_912  # of gpt-tiny


def _start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    process = _start(*arguments)
    try:
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()  # takes its ranks with it: they find their pipes closed
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_an_unknown_peer_is_an_error_that_lists_the_peers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--peers", "torch_ddp,nobody"])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "nobody" in message
    assert "torch_fsdp2" in message


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("benchmarks") / "deep" / "folder"
    peers = "single,torch_ddp,accel_zero2"
    # Two at a time, so that the reference runs in two heats.
    size = ("--model", "gpt-tiny", "--rounds", "2", "--steps", "1", "--together", "2")
    done = _run(*size, "--peers", peers, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return done.stdout, out


@pytest.fixture(scope="module")
def peers(run: tuple[str, Path]) -> Peers:
    lines = [json.loads(line) for line in (run[1] / "results.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "run"
    return {line["name"]: line for line in lines[1:]}


def test_the_table_is_printed_and_the_files_are_written(run: tuple[str, Path]) -> None:
    text, out = run
    for expected in ("single", "torch_ddp", "accel_zero2", "ratio", "optimizer", "ok "):
        assert expected in text
    assert "| torch_ddp |" in (out / "table.md").read_text()
    assert (out / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_every_round_is_recorded(peers: Peers) -> None:
    assert list(peers) == ["single", "torch_ddp", "accel_zero2"]
    for name, peer in peers.items():
        assert len(peer["seconds"]) == len(peer["ratios"]) == (4 if name == "torch_ddp" else 2)
        assert peer["check"]["difference"] <= peer["check"]["tolerance"]
        assert len(peer["save_seconds"]) == len(peer["load_seconds"]) == 3
        assert peer["load_check"]["difference"] <= peer["load_check"]["tolerance"]
    assert peers["torch_ddp"]["ratios"] == [1.0] * 4


def test_wire_and_calls_are_what_the_peers_really_send(peers: Peers) -> None:
    gradients = 4 * PARAMETERS
    assert peers["single"]["wire"] == [0.0, 0.0]
    assert peers["single"]["collectives"] == {}
    # 2 (N - 1) / N of the gradients; gloo adds a few hundred bytes of headers.
    for sent in peers["torch_ddp"]["wire"]:
        assert gradients <= sent < gradients + 4096
    assert peers["torch_ddp"]["collectives"] == {"allreduce_": 1}
    # As much in two halves, whether through sockets or not; the messages about used parameters are small.
    for sent in peers["accel_zero2"]["wire"]:
        assert gradients <= sent < gradients + 4096
    if "reduce_scatter" in peers["accel_zero2"]["collectives"]:  # ranks that may read each other's memory
        own = peers["accel_zero2"]["own"][0]["collectives"]
        assert own == {"reduce_scatter": 1, "all_gather": 1, "agree": 2}
        assert peers["accel_zero2"]["collectives"] == own


def test_bytes_at_rest_are_what_the_peers_really_hold(peers: Peers) -> None:
    size = 4 * PARAMETERS
    for name in ("single", "torch_ddp"):
        for rank in peers[name]["at_rest"]:
            assert rank["parameters"] == rank["gradients"] == size
            assert 0 <= rank["optimizer"] - 2 * size < 1024
    assert all(rank["other"] < 1024 for rank in peers["single"]["at_rest"])
    assert all(size <= rank["other"] < size + 1024 for rank in peers["torch_ddp"]["at_rest"])  # its buckets


def test_an_error_in_a_rank_comes_with_its_traceback(tmp_path: Path) -> None:
    spec = Spec(name="broken", adapter=".single:Missing", family="baseline", about="its adapter does not exist")
    crew = Crew(spec, Config(model="gpt-tiny", ranks=1), tmp_path, world_size=1, threads=1)
    try:
        with pytest.raises(
            RankFailed, match=r"(?s)broken, rank 0: Traceback.*in load.*no attribute 'Missing'"
        ) as caught:
            crew.answers()
        assert caught.value.brief.startswith("rank 0: AttributeError: module ")
    finally:
        crew.end()


def _ranks(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):  # the one that has computed the expected losses may just end
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_rank_that_dies_is_named_and_leaves_no_process(tmp_path: Path) -> None:
    process = _start("--model", "gpt-tiny", "--rounds", "9999", "--peers", "torch_ddp", "--out", str(tmp_path))
    try:
        while len(ranks := _ranks(process)) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        ranks[1].kill()
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "torch_ddp, rank 1: ended without a word, exit code -9" in err
    assert not any(rank.is_running() for rank in ranks)
    (line,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()][1:]
    assert (line["status"], line["failure"]) == ("failed", "rank 1: ended without a word, exit code -9")
