"""What fails on some ranks fails on all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from harness import Ranks
from lightning_accel.core.connecting import connect
from lightning_accel.core.unanimous import unanimous


def do(failing: list[int]) -> int:
    rank = dist.get_rank()

    def action() -> int:
        if rank in failing:
            raise OSError(f"disk of {rank}")
        return rank + 10

    return unanimous("a test", action, connect(torch.device("cpu"), None).gather_objects)


def test_each_rank_has_its_own_result(ranks3: Ranks) -> None:
    assert ranks3.run(do, []) == [10, 11, 12]


@pytest.mark.parametrize("failing", [[1], [1, 2]])
def test_who_has_failed_raises_that_and_the_others_say_who(ranks3: Ranks, failing: list[int]) -> None:
    for rank, error in enumerate(ranks3.run_expecting_error(do, failing)):
        if rank in failing:
            assert error == ("OSError", f"disk of {rank}")
        else:
            assert error == ("OSError", "rank 1 has failed in a test: disk of 1")
