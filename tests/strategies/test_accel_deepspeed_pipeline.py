"""A PipelineModule under accel_deepspeed equals a single process. Needs the extra `deepspeed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipeline_deepspeed_jobs as jobs
import pytest
import torch
from beside_deepspeed import NEEDS_DEEPSPEED, RELATIVE, Told, assert_said, assert_same, mean

from harness import Ranks

pytestmark = NEEDS_DEEPSPEED


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """One pipeline of two stages."""
    with Ranks(2, timeout=800) as ranks:
        return ranks.run(jobs.everything, str(tmp_path_factory.mktemp("saved")))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Stock Lightning on one device."""
    return jobs.fitted(jobs.Alone(), "auto")


def assert_equal_training(told: Told, alone: dict[str, Any]) -> None:
    assert_same(mean([one["losses"] for one in told]), alone["losses"])
    for one in told:
        assert_same(one["validated"], alone["validated"])
        assert (one["steps"], one["rate"]) == (alone["steps"], alone["rate"])
        assert one["continued"] == one["losses"][10:]
        assert 0 < len(one["values"]) < len(alone["values"])  # its own layers
        for name, value in one["values"].items():
            torch.testing.assert_close(value, alone["values"][name], rtol=RELATIVE, atol=1e-6)
            torch.testing.assert_close(one["values continued"][name], value, rtol=0.0, atol=0.0)
    assert {name for one in told for name in one["values"]} == alone["values"].keys()


def test_the_reference_shows_what_is_to_be_seen(alone: dict[str, Any]) -> None:
    for limit in (None, 0.15):
        other = jobs.fitted(jobs.Alone(), "auto", gradient_clip_val=limit)["losses"]
        assert abs(other[15] / alone["losses"][15] - 1) > 1e-3


@pytest.mark.parametrize("stage", jobs.STAGES)
def test_training_is_that_of_a_single_process(found: Told, alone: dict[str, Any], stage: int) -> None:
    told = [rank[f"stage {stage}"] for rank in found]
    assert_equal_training(told, alone)
    assert told[0]["losses"] == told[1]["losses"]
    assert told[0]["samples"] == told[1]["samples"] == alone["samples"]


def test_two_pipelines(alone: dict[str, Any], tmp_path: Path) -> None:
    with Ranks(4, timeout=800) as ranks:
        found = ranks.run(jobs.everything, str(tmp_path))
    assert_equal_training_of_two([rank["stage 1"] for rank in found], alone)


def assert_equal_training_of_two(told: Told, alone: dict[str, Any]) -> None:
    assert_equal_training(told, alone)
    kinds = {tuple(one["losses"]) for one in told}
    assert len(kinds) == 2  # each pipeline's own, the same on its two stages


def test_what_cannot_be_is_refused(found: Told) -> None:
    said = {
        "stage": "ZeRO stage 0 or 1 with a PipelineModule, got 2",
        "outside": "got scale outside",
        "by hand": "got automatic_optimization=False",
        "accumulates": "accumulate_grad_batches=1 with a PipelineModule, got 2",
        "twice": "once, got another call",
        "batches": "that are 3 micro-batches, as config says, got a DataLoader with batch_size=8",
        "validate": "got trainer.validate",
    }
    assert_said(found, "refused", said)
