"""Lion: its formula, and the result of a single process under every row."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from core.toys import EXACT, ROW_NAMES, Net, compare, started
from lightning_accel.optimizers import Lion
from rows import everyday


def lion(parameters: Any) -> Lion:
    return Lion(parameters, lr=0.003, betas=(0.9, 0.99), weight_decay=0.1)


def test_steps_follow_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, generator=generator, dtype=torch.float64)
    m = torch.zeros_like(x)
    parameter = nn.Parameter(x.clone())
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.7), weight_decay=0.2)
    for _ in range(6):
        g = torch.randn(40, generator=generator, dtype=torch.float64)
        parameter.grad = g.clone()
        assert optimizer.step(lambda: 3.0) == 3.0
        x = x - 0.1 * ((0.9 * m + (1 - 0.9) * g).sign() + 0.2 * x)
        m = 0.7 * m + (1 - 0.7) * g
    torch.testing.assert_close(parameter.detach(), x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(optimizer.state[parameter], {"exp_avg": m}, rtol=1e-12, atol=1e-14)


def test_what_has_no_gradient_and_no_momentum_stays() -> None:
    parameter, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([0.0, 1.0])
    optimizer = Lion([parameter, other], lr=0.5)
    optimizer.step()
    assert parameter.tolist() == [1.0, 0.5]
    assert other.tolist() == [1.0, 1.0]
    assert other not in optimizer.state


def compare_without_warnings(row: str) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return compare(Net, row, lion, steps=20, bucket_cap_mb=0.001)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_every_row_gives_the_single_process_result(ranks3: Any, row: str) -> None:
    assert max(ranks3.run(compare_without_warnings, row)) < EXACT


def segments() -> set[bool]:
    engine, _ = started("zero2", Net, lion)
    return {segment.whole for segment in engine.optimizers[0].segments}


def test_parameters_are_cut_at_any_element(ranks2: Any) -> None:
    assert ranks2.run(segments) == [{False}, {False}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr to be a number of at least 0, got -1"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\] to be a number of at least 0, got -0.1"),
        ({"betas": (0.9,)}, r"betas to be two numbers, got \(0.9,\)"),
        ({"weight_decay": None}, "weight_decay to be a number of at least 0, got None"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lion([nn.Parameter(torch.ones(2))], **settings)
