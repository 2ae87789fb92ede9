"""Seeds for all sources of random numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from harness import Ranks
from lightning_accel.manual.seeding import set_seed


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_the_same_seed_gives_the_same_numbers() -> None:
    found = []
    for seed in (3, 3, 4):
        set_seed(seed)
        found.append(drawn())
    assert found[0] == found[1]
    assert all(a != b for a, b in zip(found[0], found[2], strict=True))


def seeded(device_specific: bool) -> tuple[float, float, float]:
    set_seed(3, device_specific)
    return drawn()


def test_each_rank_may_have_its_own(ranks2: Ranks) -> None:
    first, second = ranks2.run(seeded, False)
    assert first == second
    first, second = ranks2.run(seeded, True)
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert first == ranks2.run(seeded, False)[0]


def test_a_launched_rank_is_known_before_its_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dist.is_initialized()
    monkeypatch.setenv("RANK", "1")
    set_seed(3, device_specific=True)
    found = drawn()
    set_seed(4)
    assert found == drawn()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_numpy_does_not_take(seed: int) -> None:
    with pytest.raises(ValueError, match=f"got {seed} on this one"):
        set_seed(seed)
