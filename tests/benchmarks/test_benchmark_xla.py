"""Steps on XLA devices: the table, what makes times void, and that every contestant trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import xla
from benchmarks.models import MODELS
from benchmarks.models.gpt import GPTTask
from benchmarks.stats import check_losses

RIGHT, WRONG = (check_losses([[loss]], [1.0], 1e-6) for loss in (1.0, 1.1))


def figures(seconds: list[float], **changes: object) -> xla.Figures:
    return xla.Figures(**{"seconds": seconds, "bytes_on_one": 2048, "check": RIGHT, **changes})  # type: ignore[arg-type]


def test_ratios_are_to_the_peers_of_the_same_round() -> None:
    found = {
        "hand_fsdp": figures([0.010, 0.020, 0.030]),
        "torch_xla_fsdp": figures([0.020, 0.020, 0.020]),
        "accel_fsdp": figures([0.011, 0.020, 0.027]),
    }
    lines = xla.report(found, "here").splitlines()
    assert lines[0] == "here"
    assert lines[-1].split("  ")[-1] == "1.000 [0.950, 1.050] hand_fsdp, 1.000 [0.775, 1.175] torch_xla_fsdp"
    assert lines[-1].split()[:3] == ["accel_fsdp", "20.00", "[15.50,"]
    assert lines[-3].split() == ["hand_fsdp", "20.00", "[15.00,", "25.00]", "2"], "it is nobody's peer"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"check": WRONG}, "losses differ by 1.0e-01"),
        ({"check": None}, "losses differ"),
        ({"compiled": 2}, "2 programs compiled"),
    ],
)
def test_times_that_mean_nothing_are_compared_with_nothing(changes: dict[str, object], why: str) -> None:
    found = {"hand_ddp": figures([0.01]), "accel_ddp": figures([0.01], **changes)}
    line = xla.report(found, "").splitlines()[-1]
    assert f"invalid: {why}" in line
    assert xla.comparisons(found, "accel_ddp") == {"hand_ddp": None}
    found = {"hand_ddp": figures([0.01], **changes), "accel_ddp": figures([0.01])}
    assert xla.comparisons(found, "accel_ddp") == {"hand_ddp": None}


@pytest.mark.xla
def test_all_contestants_train_and_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nano = GPTTask(vocabulary=64, dim=16, layers=2, heads=2, sequence=8, micro_batch=1)
    monkeypatch.setitem(MODELS, "gpt-nano", nano)
    assert xla.main(["--model", "gpt-nano", "--rounds", "1", "--steps", "2", "--out", str(tmp_path)]) == 0
    names = ["hand_ddp", "hand_zero", "hand_fsdp", "torch_xla_fsdp"]
    names += ["accel_ddp", "accel_zero1", "accel_zero2", "accel_fsdp"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:]] == names
    run, *contestants = map(json.loads, (tmp_path / "xla.jsonl").read_text().splitlines())
    assert run["versions"]["torch_xla"]
    assert run["machine"]["processor"]
    assert "accel_fsdp" in (tmp_path / "xla.md").read_text()
    found = {one["name"]: one["rounds"] for one in contestants}
    assert {name: one["status"] for name, one in found.items()} == dict.fromkeys(names, "valid")
    assert all(len(one["losses"]) == 7 for one in found.values())
    at_rest = {name: one["bytes_on_one"] for name, one in found.items()}
    for ours, theirs in (*xla.PEERS.items(), ("accel_fsdp", xla.WRAPPER)):
        assert at_rest[ours] == at_rest[theirs], "the same placement"
