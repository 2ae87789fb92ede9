"""What only DeepSpeed's own engine has, behind the Trainer: losses are those of a single process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deepspeed_only_jobs as jobs
import pytest
import torch
from beside_deepspeed import NEEDS_DEEPSPEED, assert_same, mean

from harness import Ranks

pytestmark = NEEDS_DEEPSPEED

KERNELS = 1e-4
"""How much DeepSpeed's Adam for the CPU may differ from torch's, relatively: rounding, which 12 steps carry on."""


def _has_no_files() -> bool:
    if find_spec("deepspeed") is None:
        return True
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return not AsyncIOBuilder().is_compatible()


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Stock Lightning on one device."""
    return jobs.alone()


def run(ranks: int, job: Any, *arguments: Any, **settings: Any) -> list[Any]:
    """By ranks of their own: DeepSpeed keeps its process groups as long as a process."""
    with Ranks(ranks, timeout=800) as used:
        return used.run(job, *arguments, **settings)


@pytest.mark.parametrize("ranks", [2, 4])
def test_parameters_of_which_ranks_keep_a_second_copy(expected: list[float], ranks: int) -> None:
    assert_same(mean(run(ranks, jobs.copies)), expected)


def test_state_in_host_memory(expected: list[float]) -> None:
    found = run(2, jobs.offloaded)
    for name in ("stage 1", "stage 2", "stage 3", "parameters"):
        assert_same(mean([rank[name] for rank in found]), expected, KERNELS)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_recomputation(expected: list[float], stage: int) -> None:
    found = run(2, jobs.recomputed, stage)
    assert_same(mean([losses for losses, _ in found]), expected)
    for losses, calls in found:
        assert calls == 2 * 3 * len(losses), "each of three blocks twice for a batch"


@pytest.mark.skipif("_has_no_files()", reason="DeepSpeed's AsyncIO cannot be built here: it needs libaio's headers")
@pytest.mark.parametrize("parameters", [False, True])
def test_state_in_files(tmp_path: Path, parameters: bool) -> None:
    """As by DeepSpeed's engine alone in host memory, in groups of any size."""
    found = run(2, jobs.in_files, str(tmp_path), parameters=parameters)
    for rank in found:
        assert rank["files"]
        assert_same(torch.tensor(rank["losses"]), torch.tensor(rank["bare"]), KERNELS)
        assert rank["difference"] < KERNELS
        assert "offload_optimizer.device: cpu" in rank["refused"]
    # Only rank 0 says it.
    assert [any("cannot be continued from" in text for text in rank["warned"]) for rank in found] == [True, False]
