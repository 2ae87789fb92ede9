"""The loss scale that a file describes changes when DeepSpeed's own does. Needs the extra `deepspeed`."""

from __future__ import annotations

import random
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_accel.deepspeed_config import DeepSpeedConfig, grad_scaler

pytestmark = [
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="needs DeepSpeed, which is not installed (extra `deepspeed`)"
    ),
    pytest.mark.matrix,  # to import it takes long
]

STEPS, RUNS = 300, 60


def settings(draw: random.Random) -> dict[str, Any]:
    return {
        "enabled": True,
        "initial_scale_power": draw.randint(4, 24),
        "loss_scale_window": draw.choice([1, 2, 3, 7, 20]),
        "hysteresis": draw.randint(1, 4),
        "consecutive_hysteresis": draw.random() < 0.5,
        "min_loss_scale": draw.choice([1, 2, 8]),
    }


def sequence(update: Any, value: Any, overflows: list[bool]) -> list[float | None]:
    """The scale after each step; None where an overflow at the smallest is an error, which ends it."""
    scales: list[float | None] = []
    for overflow in overflows:
        try:
            update(overflow)
        except Exception:
            return [*scales, None]
        scales.append(float(value()))
    return scales


def test_the_sequence_is_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = import_module("deepspeed.runtime.fp16.loss_scaler")
    precision = import_module("deepspeed.runtime.precision_config")
    monkeypatch.setattr(theirs, "dist", SimpleNamespace(get_rank=lambda: 1))  # there is no process group
    draw = random.Random(0)
    grew = shrank = ended = 0
    for _ in range(RUNS):
        file = {"fp16": settings(draw)}
        rate = draw.choice([0.05, 0.2, 0.4])
        overflows = [draw.random() < rate for _ in range(STEPS)]
        scaler = theirs.CreateLossScaler(
            torch.half, 0, True, precision.get_float16_config(file).dynamic_loss_scale_args()
        )
        expected = sequence(scaler.update_scale, lambda scaler=scaler: scaler.cur_scale, overflows)
        # Ours grows no further than fp32 reaches: what comes after is not compared.
        reach = next((step for step, scale in enumerate(expected) if scale and scale > 2.0**127), len(expected))
        ours = grad_scaler(DeepSpeedConfig.read(file), "fp16")
        assert ours is not None
        scale = ours._scale
        found = sequence(scale.update, lambda scale=scale: scale.value, overflows)
        assert found[:reach] == expected[:reach], file
        known = [scale for scale in expected[:reach] if scale is not None]
        grew += sum(after > before for before, after in zip(known, known[1:], strict=False))
        shrank += sum(after < before for before, after in zip(known, known[1:], strict=False))
        ended += expected[-1] is None
    assert grew > 100, "void"
    assert shrank > 100, "void"
    assert 5 < ended < RUNS, "void"
