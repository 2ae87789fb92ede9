"""What counts as worse than before, from made-up ratios."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import render
from benchmarks.baseline import FLOOR, compare, tolerance
from benchmarks.cli import _verdict
from benchmarks.config import Config
from benchmarks.result import PeerResult
from benchmarks.stats import LossCheck

STEADY = [1.50, 1.51, 1.49, 1.50, 1.50]


def _run(ratios: list[float], **changes: Any) -> tuple[dict[str, Any], list[PeerResult]]:
    header = {"config": Config(model="gpt-tiny", **changes).public(), "reference": "torch_ddp"}
    check = LossCheck(steps=1, difference=0.0, tolerance=1.0)
    reference = PeerResult("torch_ddp", "torch", "", ratios=[1.0] * 5, ratio_to="torch_ddp", check=check)
    return header, [reference, PeerResult("mine", "accel", "", ratios=ratios, ratio_to="torch_ddp", check=check)]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    render.write_jsonl(path, [_run(STEADY)])
    return path


def test_the_same_ratios_are_no_worse(before: Path) -> None:
    (change,), missing = compare(before, [_run(STEADY)])
    assert (change.name, change.before, change.now, change.worse, missing) == ("mine", 1.5, 1.5, False, [])
    assert _verdict([_run(STEADY)], before) == 0


def test_a_step_that_takes_a_tenth_more_is_worse(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = [1.1 * ratio for ratio in STEADY]
    assert _verdict([_run(slower)], before) == 1
    line = capsys.readouterr().out
    assert line.startswith("worse: mine (gpt-tiny, 2 ranks")
    assert line.endswith(") 1.500 -> 1.650, +10.0% (at most +5.0%)\n")


def test_a_tenth_is_nothing_where_rounds_differ_by_more(before: Path) -> None:
    noisy = [1.2, 1.4, 1.65, 1.9, 2.1]
    assert tolerance(STEADY, STEADY) == FLOOR
    # 1.2533 * (1.9 - 1.4) / 1.349 / sqrt(5) / 1.65 is 0.126; three times that, and next to nothing of the steady ones
    assert tolerance(STEADY, noisy) == pytest.approx(3 * 0.126, rel=0.01)
    assert _verdict([_run(noisy)], before) == 0


def test_a_peer_that_failed_since_is_worse(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, (reference, _) = _run(STEADY)
    broken = PeerResult("mine", "accel", "", failure="it broke", story="it broke")
    assert _verdict([(header, [reference, broken])], before) == 1
    assert "mine: valid in the baseline, failed now" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"accumulate": 4}, {"precision": "bf16-mixed"}, {"ranks": 3}, {"recompute": True}])
def test_other_settings_are_not_compared(before: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="to have peers in common with this run"):
        compare(before, [_run(STEADY, **changes)])


@pytest.mark.parametrize("text", ["no json", '{"kind": "run"}', '{"kind": "peer"}', "[1]"])
def test_another_file_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=r"Expected a results\.jsonl of this benchmark, got .*line 1"):
        compare(path, [_run(STEADY)])
