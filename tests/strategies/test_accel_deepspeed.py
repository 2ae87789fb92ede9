"""DeepSpeed's own engine behind the Trainer equals a single process. Needs the extra `deepspeed`."""

from __future__ import annotations

from typing import Any

import deepspeed_jobs as jobs
import pytest
import torch
from beside_deepspeed import NEEDS_DEEPSPEED, RELATIVE, Told, assert_said, assert_same, mean

from harness import Ranks

pytestmark = NEEDS_DEEPSPEED


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """By ranks of their own."""
    with Ranks(2, timeout=800) as ranks:
        return ranks.run(jobs.everything, str(tmp_path_factory.mktemp("saved")))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Stock Lightning on one device."""
    return jobs.fitted(jobs.Float32(), "auto")


def test_the_reference_shows_what_is_to_be_seen(alone: dict[str, Any]) -> None:
    for changed in ({"gradient_clip_val": None}, {"accumulate_grad_batches": 1}, {"gradient_clip_val": 0.15}):
        other = jobs.fitted(jobs.Float32(), "auto", **changed)["losses"]
        assert abs(other[15] / alone["losses"][15] - 1) > 1e-3


@pytest.mark.parametrize("stage", jobs.STAGES)
def test_training_is_that_of_a_single_process(found: Told, alone: dict[str, Any], stage: int) -> None:
    told = [rank[f"stage {stage}"] for rank in found]
    assert [one["steps"] for one in told] == [jobs.STEPS] * 2
    assert_same(mean([one["losses"] for one in told]), alone["losses"])
    for one in told:
        torch.testing.assert_close(one["values"], alone["values"], rtol=RELATIVE, atol=1e-6)


def test_clipping_and_accumulation_happen_once(found: Told) -> None:
    for rank in found:
        # Two of three steps of an epoch have two batches; the 20 steps end in the seventh epoch.
        assert rank["counts"] == {"steps": 20, "clippings": 20, "others": 0, "backwards": 34, "told": (0.3, 2, 16)}


@pytest.mark.parametrize("stage", jobs.STAGES)
def test_manual_optimization(found: Told, stage: int) -> None:
    expected = jobs.by_hand("auto")
    told = [rank[f"by hand {stage}"] for rank in found]
    assert_same(mean([one["losses"] for one in told]), expected["losses"])
    assert told[0]["steps"] == expected["steps"] == jobs.STEPS


@pytest.mark.parametrize("stage", jobs.STAGES)
def test_groups_and_schedules_reach_adagrad(found: Told, stage: int) -> None:
    expected = jobs.fitted(jobs.Adagrads(), "auto")["losses"]
    told = [rank[f"adagrad {stage}"] for rank in found]
    assert_same(mean([one["losses"] for one in told]), expected)
    assert_same(mean([one["continued"] for one in told]), expected[-len(told[0]["continued"]) :])


@pytest.mark.parametrize("module", ["FromFile", "FromFileWithSchedule"])
def test_a_file_means_what_it_means_to_our_engine(found: Told, module: str) -> None:
    theirs, ours = (
        mean([rank[f"{kind} {module}"] for rank in found]) for kind in ("AccelDeepSpeedStrategy", "AccelZeROStrategy")
    )
    assert abs(theirs[-1] / theirs[3] - 1) > 0.05, "void"
    assert_same(theirs, ours)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16(found: Told, alone: dict[str, Any], precision: str) -> None:
    told = [rank[precision] for rank in found]
    assert_same(mean([one["losses"] for one in told]), alone["losses"], 0.1)  # 8 bits, and 20 steps
    for one in told:
        assert one["dtype"] == ("torch.float32" if precision == "bf16-mixed" else "torch.bfloat16")
        assert one["has master values"] == (precision == "bf16-mixed")
        assert one["test"] == pytest.approx(alone["losses"][-1], rel=0.5)


@pytest.mark.parametrize("stage", [2, 3])
def test_evaluation_and_the_model_afterwards(found: Told, stage: int) -> None:
    for rank in found:
        told = rank[f"evaluated {stage}"]
        assert told["validated"] == 1 + jobs.BATCHES
        assert told["predicted"] == [(4, 3)] * jobs.BATCHES
        assert told["test"] == pytest.approx(told["expected"], rel=1e-5)
        first, expected, steps = told["again"]
        assert first == pytest.approx(expected, rel=1e-5)
        assert steps == 3
        assert not told["params"]
        assert not told["hooks"]


@pytest.mark.parametrize("stage", jobs.STAGES)
def test_checkpoints(found: Told, alone: dict[str, Any], stage: int) -> None:
    told = [rank[f"saved {stage}"] for rank in found]
    whole = mean([one["whole"] for one in told])
    assert_same(whole, alone["losses"])
    assert "step=9.ckpt" in told[0]["files"]
    assert not [name for name in told[0]["files"] if "unfinished" in name]
    assert_same(mean([one["continued"] for one in told]), whole[15:])
    converted = told[0]["converted"]["state_dict"]
    torch.testing.assert_close(told[1]["validated"], converted, rtol=0.0, atol=0.0)
    if stage:
        torch.testing.assert_close(told[0]["by deepspeed"], converted, rtol=0.0, atol=0.0)
        assert f"of stage {stage} on 2" in told[0]["another stage"]
    # Momentum came along: the next window's losses are those of the run that went on.
    assert_same(mean([one["by zero2"] for one in told])[:4], whole[15:19])


@pytest.mark.parametrize("stage", jobs.STAGES)
def test_a_fit_leaves_nothing_behind(found: Told, stage: int) -> None:
    assert [rank[f"left {stage}"] for rank in found] == [0, 0]


def test_what_cannot_be_is_refused(found: Told) -> None:
    said = {
        "accumulation": "accumulate_grad_batches=4",
        "clipping": "gradient_clip_val=0.5",
        "by value": "by norm only",
        "batches": "4 × 2 × 2 = 16",
        "own clipping": "OwnClipping.configure_gradient_clipping",
        "float64": "got float64 (net.first.weight)",
        "two": "Expected one optimizer with strategy='accel_deepspeed', got 2",
        "none": "got None from configure_optimizers",
        "by hand": "with manual optimization, got 2",
        "took back": "before backward",
        "clips by hand": "clipped as DeepSpeed was told before training (to a norm of 0.0",
    }
    assert_said(found, "refused", said)
