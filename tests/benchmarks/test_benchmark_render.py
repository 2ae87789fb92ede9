"""Tables, JSON lines and chart from made-up figures."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import chart, render
from benchmarks.config import Config
from benchmarks.peers import PEERS, choose
from benchmarks.result import PeerResult
from benchmarks.stats import LossCheck

MIB = 2**20


@pytest.fixture
def header() -> dict[str, Any]:
    return {
        "date": "2001-02-03T04:05:06+00:00",
        "command": "python -m benchmarks --quick",
        "machine": {"processor": "A Processor", "cores": 2},
        "versions": {"torch": "2.0", "absent": None},
        "config": Config().public(),
        "reference": "torch_ddp",
        "unit": "tokens",
    }


def _result(name: str, ratios: list[float], difference: float) -> PeerResult:
    return PeerResult(
        name,
        PEERS[name].family,
        PEERS[name].about,
        units_per_step=512,
        start_seconds=[3.5, 4.0],
        seconds=[0.1 * ratio for ratio in ratios],
        ratios=ratios,
        ratio_to="torch_ddp",
        over_single=0.25,
        others_cpu=[0.25] * len(ratios),
        peak_memory=[10 * MIB, 11 * MIB],
        allocator_peak=[12 * MIB, 9 * MIB],
        at_rest=[
            {"parameters": 4 * MIB, "gradients": 2 * MIB, "optimizer": MIB, "other": 0},
            {"parameters": 4 * MIB, "gradients": 3 * MIB, "optimizer": MIB, "other": 0},
        ],
        wire=[1.0 * MIB, 2.0 * MIB],
        collectives={"allreduce_": 3, "broadcast_": 4},
        own=[None, None],
        losses=[[2.0, 1.0]],
        save_seconds=[0.5, 0.25, 1.0],
        load_seconds=[0.125, 0.5, 0.25],
        check=LossCheck(steps=2, difference=difference, tolerance=1e-6),
    )


@pytest.fixture
def results() -> list[PeerResult]:
    missing = PEERS["accel_zero2"]
    return [
        _result("torch_ddp", [1.0, 1.0, 1.0], 1e-8),
        _result("torch_zero", [1.5, 1.2, 1.3], 1e-2),
        PeerResult(missing.name, missing.family, missing.about, obstacle="it is not installed"),
    ]


def test_a_row_has_the_medians_the_largest_rank_and_the_mean_wire(results: list[PeerResult]) -> None:
    row = dict(zip(render.COLUMNS, render.cells(results[1]), strict=True))
    assert row == {
        "peer": "torch_zero",
        "step ms": "130.0",
        "ratio": "1.300",
        "quartiles": "1.25..1.40",
        "per s": "3,938",
        "over single": "+25.0%",
        "start s": "4.0",
        "save s": "0.500",
        "load s": "0.250",
        "wire MiB": "1.5",
        "calls": "7",
        "peak MiB": "11.0",
        "alloc MiB": "12.0",
        "parameters MiB": "4.0",
        "gradients MiB": "3.0",
        "optimizer MiB": "1.0",
        "other MiB": "0.0",
        "losses": "off 1e-02",
    }


def test_markdown_lists_every_peer_and_why_one_did_not_run(header: dict[str, Any], results: list[PeerResult]) -> None:
    results[1].unsaved = "saving: it cannot"
    page = render.markdown(header, results)
    assert "torch_zero: saving and loading not measured: saving: it cannot" in page
    assert "| 4.0 | 0.500 | 0.250 | 1.5 |" in page
    assert "| 4.0 | - | - | 1.5 |" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert len(rows) == 2 + len(results)
    assert "accel_zero2 did not run: it is not installed" in page
    assert "torch_zero is invalid" in page
    assert "other processes took 25% of it" in page
    assert header["command"] in page


def test_terminal_tables_fit_into_80_columns(header: dict[str, Any], results: list[PeerResult]) -> None:
    slow = _result(max(PEERS, key=len), [2.456, 2.001], 1e-2)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render.tables(header, [*results, slow]))
    text = console.export_text()
    assert "…" not in text
    assert slow.name in text
    for expected in ("torch_zero", "1.300", "off 1e-02", "not run", "optimizer"):
        assert expected in text


def test_jsonl_has_the_run_then_the_peers(tmp_path: Path, header: dict[str, Any], results: list[PeerResult]) -> None:
    path = tmp_path / "results.jsonl"
    render.write_jsonl(path, [(header, results)])
    run, *peers = [json.loads(line) for line in path.read_text().splitlines()]
    assert run["kind"] == "run"
    assert run["config"]["model"] == Config().model
    assert [peer["name"] for peer in peers] == ["torch_ddp", "torch_zero", "accel_zero2"]
    assert peers[1]["ratios"] == [1.5, 1.2, 1.3]
    assert peers[2]["obstacle"] == "it is not installed"


def test_chart_is_drawn(tmp_path: Path, header: dict[str, Any], results: list[PeerResult]) -> None:
    path = tmp_path / "chart.png"
    chart.draw(path, header, results)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_peer_is_named_with_all_that_exist() -> None:
    with pytest.raises(ValueError, match="Unknown peer: nobody") as caught:
        choose(["torch_ddp", "nobody"])
    assert all(name in str(caught.value) for name in PEERS)


def test_no_peer_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="No peer"):
        choose([])
