"""What tests that run DeepSpeed have in common."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

NEEDS_DEEPSPEED = [
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="needs DeepSpeed, which is not installed (extra `deepspeed`)"
    ),
    pytest.mark.matrix,
    pytest.mark.timeout(900),  # to import it takes longer than anything else here
]

# fp32 has 24 bits, and sums are taken in another order; and 20 steps add up.
RELATIVE = 1e-5

Told = list[dict[str, Any]]
"""What each rank has to tell."""


def mean(parts: list[list[float]]) -> torch.Tensor:
    return torch.tensor(parts).mean(0)


def assert_same(actual: Any, expected: Any, tolerance: float = RELATIVE) -> None:
    actual, expected = (torch.as_tensor(each) for each in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0.0)


def assert_said(found: Told, key: str, said: dict[str, str]) -> None:
    """Every rank was refused everything, with a message that has the part given."""
    for rank in found:
        assert rank[key].keys() == said.keys()
        for name, part in said.items():
            assert part in rank[key][name], name
