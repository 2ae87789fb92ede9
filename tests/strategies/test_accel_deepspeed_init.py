"""At stage 3 accel_deepspeed has each rank make its part of each parameter. Needs the extra `deepspeed`."""

from __future__ import annotations

from typing import Any

import init_deepspeed_jobs as jobs
import pytest
from beside_deepspeed import NEEDS_DEEPSPEED, Told, assert_same, mean

from harness import Ranks

pytestmark = NEEDS_DEEPSPEED


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """By ranks of their own."""
    with Ranks(2, timeout=800) as ranks:
        return ranks.run(jobs.everything, str(tmp_path_factory.mktemp("saved")))


@pytest.fixture(scope="module")
def alone() -> Any:
    """Stock Lightning on one device."""
    return jobs.fitted("auto", 1)


def assert_in_parts(counted: tuple[int, int]) -> None:
    rests, part = counted
    assert part <= rests <= 1.1 * part


def test_a_rank_makes_its_part(found: Told) -> None:
    for rank in found:
        assert_in_parts(rank["bytes"])
        assert_in_parts(rank["fabric"]["bytes"])
        rests, part = rank["whole"]
        assert rests > 1.9 * part  # at stage 2


def test_training_is_that_of_a_single_process(found: Told, alone: Any) -> None:
    whole = mean([rank["losses"] for rank in found])
    assert_same(whole, alone.losses)
    assert_same(mean([rank["continued"] for rank in found]), whole[15:])
    assert all(rank["validated"] > 0 for rank in found)
    again = sum(rank["again"] for rank in found) / 2
    assert again < 1.1 * float(whole[-1]), "it began anew"


def test_a_loop_with_fabric(found: Told) -> None:
    assert_same(mean([rank["fabric"]["losses"] for rank in found]), jobs.fabric_loop("auto", 1)["losses"])


def test_what_was_trained_in_parts_is_evaluated_afterwards(found: Told) -> None:
    for rank in found:
        (at_stage_3, joined), (at_stage_2, _) = rank["evaluated"]
        assert at_stage_3 == at_stage_2 == joined
        assert joined < 1.1 * rank["losses"][-1], "of a model that was trained"
