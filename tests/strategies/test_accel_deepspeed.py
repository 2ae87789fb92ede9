"""DeepSpeed's own engine behind the Trainer equals a single process. Needs the extra `deepspeed`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import deepspeed_jobs as jobs
import pytest
import torch

from harness import Ranks

pytestmark = [
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="needs DeepSpeed, which is not installed (extra `deepspeed`)"
    ),
    pytest.mark.matrix,
    pytest.mark.timeout(900),  # to import it takes longer than anything else here
]

# fp32 has 24 bits, and sums are taken in another order; and 20 steps add up.
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What each rank has to tell, by ranks of their own."""
    with Ranks(2, timeout=800) as ranks:
        return ranks.run(jobs.everything)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same by stock Lightning on one device."""
    return jobs.fitted(jobs.Float32(), "auto")


@pytest.mark.parametrize("stage", jobs.STAGES)
def test_training_is_that_of_a_single_process(found: list[dict[str, Any]], alone: dict[str, Any], stage: int) -> None:
    told = [rank[f"stage {stage}"] for rank in found]
    assert [one["steps"] for one in told] == [jobs.STEPS] * 2
    assert len(alone["losses"]) == len(told[0]["losses"])
    losses = torch.tensor([one["losses"] for one in told]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(alone["losses"]), rtol=RELATIVE, atol=0.0)
    for one in told:
        torch.testing.assert_close(one["values"], alone["values"], rtol=RELATIVE, atol=1e-6)
