"""The memory of one step: its arithmetic, its pictures, and one run of the command."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import memory
from benchmarks.cli import main
from benchmarks.config import Config
from benchmarks.memory import PeerMemory
from benchmarks.peers import PEERS
from benchmarks.timeline import Timeline, allocator_peak

ROOT = Path(__file__).parents[2]
MIB = 2**20
PARAMETERS = 134_912  # of gpt-tiny


def _timeline(scale: int = 1) -> Timeline:
    phases = [("forward", 1000), ("backward", 1400), ("optimizer", 1900)]
    # Not in order of time; the backward frees what the forward took.
    changes = [(1500, 5 * scale), (1100, 3 * scale), (1200, 4 * scale), (1800, -12 * scale), (1950, scale)]
    return Timeline.of(10 * scale, changes, phases, end=2000, rested=11 * scale + 2)


def test_changes_add_up_in_order_of_time() -> None:
    timeline = _timeline()
    assert timeline.moments == pytest.approx([0.0, 0.1, 0.2, 0.5, 0.8, 0.95])
    assert timeline.sizes == [10, 13, 17, 22, 10, 11]
    assert [name for name, _ in timeline.phases] == ["forward", "backward", "optimizer"]
    assert [start for _, start in timeline.phases] == pytest.approx([0.0, 0.4, 0.9])
    assert timeline.unexplained == 2


def test_each_phase_has_its_peak_with_what_it_starts_from() -> None:
    timeline = _timeline()
    assert (timeline.resting, timeline.peak) == (10, 22)
    assert [timeline.peak_of(phase) for phase in ("forward", "backward", "optimizer")] == [17, 22, 11]


def test_phases_that_come_several_times_count_together() -> None:
    phases = [("forward", 0), ("backward", 10), ("forward", 20), ("backward", 30), ("optimizer", 40)]
    timeline = Timeline.of(0, [(5, 1), (15, 6), (16, -5), (25, 3), (35, 1)], phases, end=50, rested=6)
    assert [timeline.peak_of(phase) for phase in ("forward", "backward", "optimizer")] == [5, 7, 6]
    assert timeline.unexplained == 0


def test_on_a_gpu_its_allocator_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    peer: Any = SimpleNamespace(run=lambda steps: calls.append(steps), has_phases=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert allocator_peak(peer) == 123
    assert calls == ["reset", 1]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)  # the peer is not on it
    assert allocator_peak(peer) is None


@pytest.fixture
def header() -> dict[str, Any]:
    return {
        "date": "2001-02-03T04:05:06+00:00",
        "command": "python -m benchmarks --memory",
        "machine": {"processor": "A Processor", "cores": 2},
        "versions": {"torch": "2.0"},
        "config": Config().public(),
    }


@pytest.fixture
def results() -> list[PeerMemory]:
    return [
        PeerMemory(name=name, family=PEERS[name].family, timelines=[_timeline(MIB), _timeline(2 * MIB)])
        for name in ("torch_fsdp2_partial", "accel_fsdp")
    ]


def test_the_rank_with_the_highest_peak_is_shown(header: dict[str, Any], results: list[PeerMemory]) -> None:
    assert memory.cells(results[1]) == ["accel_fsdp", "20.0", "44.0", "34.0", "44.0", "22.0", "0.0"]
    page = memory.markdown(header, results)
    assert "| accel_fsdp | 20.0 | 44.0 | 34.0 | 44.0 | 22.0 | 0.0 |" in page
    assert header["command"] in page


def test_the_table_fits_into_80_columns(header: dict[str, Any], results: list[PeerMemory]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(memory.table(header, results))
    text = console.export_text()
    assert "…" not in text
    assert "torch_fsdp2_partial" in text


def test_the_chart_is_drawn(tmp_path: Path, header: dict[str, Any], results: list[PeerMemory]) -> None:
    path = tmp_path / "memory.png"
    memory.draw(path, header, results)
    assert path.read_bytes().startswith(b"\x89PNG")


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "--memory", *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_a_trainer_cannot_be_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--memory", "--peers", "trainer_ddp"])
    assert exit_.value.code == 2
    assert "its Trainer runs the loop" in capsys.readouterr().err


@pytest.mark.matrix
def test_the_command_records_every_allocation_of_a_step(tmp_path: Path) -> None:
    done = _run("--model", "gpt-tiny", "--warmup", "1", "--peers", "accel_fsdp", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "accel_fsdp" in done.stdout
    assert "| accel_fsdp |" in (tmp_path / "memory.md").read_text()
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    run, peer = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert (run["kind"], peer["kind"], peer["name"]) == ("run", "memory", "accel_fsdp")
    for timeline in peer["timelines"]:
        sizes = timeline["sizes"]
        # Parameters, gradients and two numbers of AdamW for each: 16 bytes, divided by two ranks; step counts.
        assert 0 <= sizes[0] - 8 * PARAMETERS < 1024
        # gloo's threads may hold the bytes of the ranks' last agreement a little longer.
        assert abs(sizes[-1] - sizes[0]) < 1024
        assert abs(timeline["unexplained"]) < 1024
        assert max(sizes) > 1.5 * sizes[0]
        assert len(timeline["moments"]) == len(sizes) > 100
        assert [name for name, _ in timeline["phases"]] == ["forward", "backward", "optimizer"]
