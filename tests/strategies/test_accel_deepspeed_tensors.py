"""A model that AutoTP divides, under accel_deepspeed, equals a single process. Needs the extra `deepspeed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import divided_deepspeed_jobs as jobs
import pytest
import torch
from beside_deepspeed import NEEDS_DEEPSPEED, RELATIVE, Told, assert_same, mean

from harness import Ranks

pytestmark = NEEDS_DEEPSPEED


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """One replica on two ranks."""
    with Ranks(2, timeout=800) as ranks:
        return ranks.run(jobs.with_tensors_divided, str(tmp_path_factory.mktemp("saved")))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Stock Lightning on one device."""
    return jobs.fitted(jobs.Speaker(), "auto")


def assert_equal_training(told: Told, alone: dict[str, Any], replicas: int) -> None:
    assert_same(mean([one["losses"] for one in told]), alone["losses"])
    for one in told:
        torch.testing.assert_close(one["values"], alone["values"], rtol=RELATIVE, atol=1e-6)
        assert one["shapes"]["blocks.0.self_attn.q_proj.weight"] == (jobs.WIDTH // 2, jobs.WIDTH)
        assert one["shapes"]["blocks.0.self_attn.o_proj.weight"] == (jobs.WIDTH, jobs.WIDTH // 2)
        # The model afterwards is the one before: its own layers, with its own number of heads.
        assert (one["heads"], one["kinds"]) == (alone["heads"], alone["kinds"])
        assert one["logged"] == pytest.approx(alone["logged"], rel=1e-5)
        assert_same(mean([one["continued"] for one in told]), mean([one["losses"] for one in told])[15:])
        torch.testing.assert_close(one["values continued"], one["values"], rtol=RELATIVE, atol=1e-6)
    for first, second in zip(told[::2], told[1::2], strict=True):
        assert first["samples"] == second["samples"]
    replicas_had = [sorted(sum(batches, [])) for batches in zip(*(one["samples"] for one in told[::2]), strict=True)]
    assert replicas_had == [sorted(batch) for batch in alone["samples"]]
    assert len(told) == 2 * replicas


def test_the_reference_shows_what_is_to_be_seen(alone: dict[str, Any]) -> None:
    for changed in ({"gradient_clip_val": None}, {"accumulate_grad_batches": 1}, {"gradient_clip_val": 0.15}):
        other = jobs.fitted(jobs.Speaker(), "auto", **changed)["losses"]
        assert abs(other[15] / alone["losses"][15] - 1) > 1e-3


@pytest.mark.parametrize("stage", jobs.STAGES)
def test_training_is_that_of_a_single_process(found: Told, alone: dict[str, Any], stage: int) -> None:
    assert_equal_training([rank[f"stage {stage}"] for rank in found], alone, 1)


def test_two_replicas(alone: dict[str, Any], tmp_path: Path) -> None:
    with Ranks(4, timeout=800) as ranks:
        found = ranks.run(jobs.with_tensors_divided, str(tmp_path))
    assert_equal_training([rank["stage 1"] for rank in found], alone, 2)
    expected = jobs.fabric_loop("", lambda: "auto", 1)["losses"]
    assert_same(mean([rank["fabric"]["losses"] for rank in found]), expected)


def test_dropout_is_that_of_one_replica(found: Told, alone: dict[str, Any]) -> None:
    first, second = (rank["dropped"] for rank in found)
    assert first["losses"] == second["losses"]
    assert abs(first["losses"][0] / alone["losses"][0] - 1) > 1e-3, "void"
    for name, value in first["values"].items():
        torch.testing.assert_close(value, second["values"][name], rtol=0.0, atol=0.0)


def test_a_loop_with_fabric(found: Told) -> None:
    expected = jobs.fabric_loop("", lambda: "auto", 1)
    for rank in found:
        assert rank["fabric"]["samples"] == expected["samples"]
        assert_same(rank["fabric"]["losses"], expected["losses"])


def test_what_cannot_be_is_refused(found: Told) -> None:
    said = {
        "own sampler": "num_replicas=1 and, on this rank, rank=0",
        "batches": "as config says (16 = 8 × 2 × 1), got a DataLoader with batch_size=4",
        "other layout": "a file of tensor, pipeline or expert parallelism, which cannot be converted",
    }
    for rank in found:
        assert rank["refused"].keys() == said.keys()
        for name, part in said.items():
            assert part in rank["refused"][name], name
