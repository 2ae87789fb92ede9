"""What hooks cost: the table, and that every contestant trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import overhead


def test_the_overhead_is_to_the_bare_step_of_the_same_round() -> None:
    found = {"bare": [(0.010, 0.002), (0.020, 0.004), (0.012, 0.003)], "it": [(0.013, 0.001)] * 2 + [(0.016, 0.002)]}
    lines = overhead.report(found).splitlines()
    assert lines[0].startswith("400 parameters, one process; ms, medians of 3 rounds")
    assert lines[-2].split() == ["bare", "12.00", "0.00", "[0.00,", "0.00]", "3.00"]
    assert lines[-1].split() == ["it", "13.00", "3.00", "[-2.00,", "3.50]", "1.00"]


@pytest.mark.matrix
def test_all_contestants_train(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overhead.main(["--rounds", "1", "--out", str(tmp_path / "results")])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:]]
    rows = [f"accel_{row}" for row in overhead.ROWS]
    assert names == ["bare", "torch_ddp", "torch_fsdp2", *rows, "accelerator_ddp", "fabric_ddp", "fabric_accel_ddp"]
    first, *others = map(json.loads, (tmp_path / "results" / "overhead.jsonl").read_text().splitlines())
    assert first["command"].startswith("python -m benchmarks.overhead")
    assert [line["name"] for line in others] == names
    table = (tmp_path / "results" / "overhead.md").read_text()
    assert all(f"\n    {name} " in table for name in names)
