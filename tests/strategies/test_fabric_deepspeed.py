"""DeepSpeed's own engine behind Fabric equals a single process. Needs the extra `deepspeed`."""

from __future__ import annotations

from typing import Any

import fabric_deepspeed_jobs as jobs
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
    """Stock Fabric on one device, where the loop clips."""
    return jobs.trained("auto")


@pytest.mark.parametrize("stage", jobs.STAGES)
def test_a_loop_equals_a_single_process(found: Told, alone: dict[str, Any], stage: int) -> None:
    told = [rank[f"stage {stage}"] for rank in found]
    assert_same(mean([one["losses"] for one in told]), alone["losses"])
    for one in told:
        torch.testing.assert_close(one["values"], alone["values"], rtol=RELATIVE, atol=1e-6)
        assert one["lr"] == pytest.approx(alone["lr"])
        assert one["kind"] == ("FabricSGD", True)
        assert one["told"] == (jobs.CLIPPING, jobs.ACCUMULATE, jobs.STEPS)
        assert stage == 0 or one["norm"] > 0
        assert not one["hooks"]
        assert one["released"]


def test_clipping_and_accumulation_happen_once(found: Told, alone: dict[str, Any]) -> None:
    for rank in found:
        assert rank["counts"] == {"steps": jobs.STEPS, "clippings": jobs.STEPS}
    unclipped = mean([rank["unclipped"] for rank in found])
    assert abs(unclipped[-1] / alone["losses"][-1] - 1) > 1e-3, "void"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16(found: Told, alone: dict[str, Any], precision: str) -> None:
    told = [rank[precision] for rank in found]
    assert_same(mean([one["losses"] for one in told]), alone["losses"], 0.1)  # 8 bits, and 20 steps
    for one in told:
        assert one["dtype"] == ("torch.float32" if precision == "bf16-mixed" else "torch.bfloat16")
    for rank in found:
        untouched, rounded, dtype = rank["evaluated"]
        assert untouched == 0.0
        assert 0 < rounded < 0.1
        assert dtype == "torch.float32"


@pytest.mark.parametrize("stage", jobs.STAGES)
def test_checkpoints(found: Told, stage: int) -> None:
    told = [rank[f"saved {stage}"] for rank in found]
    assert_same(mean([one["continued"] for one in told]), mean([one["whole"] for one in told]))
    torch.testing.assert_close(told[1]["values"], told[0]["converted"], rtol=0.0, atol=0.0)
    said = {
        "other stage": f"of stage {stage} on 2",
        "without the optimizer": "the model and its optimizer in the state",
        "names": "got 'module'",
        "remote": "a local path",
        "not there": "found nothing",
        "a file": "a checkpoint of DeepSpeed's to continue from",
        "no such key": "'epoch'",
        "with gradients": "between a step and the next backward",
        "raw": "fabric.load_raw",
    }
    assert_said(told, "refused", said)
    assert all(one["rest"] == [] for one in told)


def test_what_cannot_be_is_refused(found: Told) -> None:
    said = {
        "clips": "(to a norm of 0.3; 0 is none), got 0.5 by norm by fabric.clip_gradients",
        "by value": "got 0.5 by value",
        "took back": "before backward",
        "too early": "after 2 micro-batches, as config says (gradient_accumulation_steps), got the first step after 1",
        "too late": "got another backward after 2",
        "two": "Expected one optimizer with strategy='accel_deepspeed', got 2",
        "apart": "Expected fabric.setup(model, optimizer)",
        "float64": "got float64 (first.weight)",
        "which": "fabric.backward(loss, model=model), as 2 models",
        "batches": "got 33",
        "optimizer state": "got optimizer.state_dict()",
        "optimizer's loading": "got optimizer.load_state_dict()",
        "model state": "got model.state_dict()",
        "model's loading": "got model.load_state_dict()",
        "by itself": "fabric.backward",
    }
    assert_said(found, "refused", said)


def test_two_models(found: Told) -> None:
    for name, seed in (("first", 0), ("second", 1)):
        assert_same(mean([rank["two models"][name] for rank in found]), jobs.alone_with(seed))


def test_of_all_ranks(found: Told) -> None:
    for rank in found:
        assert rank["of all ranks"] == {"mean": 0.5, "sum": 1, "gathered": [0, 1], "stage": 2}
