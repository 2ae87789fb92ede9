"""Scales replayed step by step, and what they are restored from."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_accel.core.loss_scale import LARGEST, SMALLEST, LossScale, find_rule

QUIET = {"raise_at_min_scale": False}


def replay(scale: LossScale, steps: str) -> list[float]:
    """The scale after each step; X is an overflow."""
    found = []
    for step in steps:
        scale.update(step == "X")
        found.append(scale.value)
    return found


@pytest.mark.parametrize(
    ("rule", "settings", "steps", "expected"),
    [
        (
            "deepspeed",
            {"init_scale": 256, "growth_interval": 2},
            "." * 10,
            [256, 256, 512, 512, 1024, 1024, 2048, 2048, 4096, 4096],
        ),
        ("deepspeed", {"init_scale": 16, "hysteresis": 1, **QUIET}, "X" * 8, [8, 4, 2, 1, 1, 1, 1, 1]),
        (
            "deepspeed",
            {"init_scale": 65536, "hysteresis": 2},
            "XXX..XX",
            [65536, 32768, 16384, 16384, 16384, 8192, 4096],
        ),
        (
            "deepspeed",
            {"init_scale": 65536, "hysteresis": 2, "consecutive_hysteresis": True},
            "XXX.XX",
            [65536, 32768, 16384, 16384, 16384, 8192],
        ),
        # The step right after an overflow does not count, and growth forgives the overflows before it.
        (
            "deepspeed",
            {"init_scale": 64, "growth_interval": 2, "hysteresis": 2},
            "XX...XX",
            [64, 32, 32, 32, 64, 64, 32],
        ),
        ("torch", {"init_scale": 256, "growth_interval": 2}, "." * 6, [256, 512, 512, 1024, 1024, 2048]),
        ("torch", {"init_scale": 16}, "X" * 6, [8, 4, 2, 1, 0.5, 0.25]),
        ("torch", {"init_scale": 16, "growth_interval": 2}, ".X..", [16, 8, 8, 16]),
        ("torch", {"init_scale": 100.0, "growth_factor": 1.5, "backoff_factor": 0.1, "growth_interval": 1}, "X.", None),
        ("torch", {"init_scale": SMALLEST}, "XX", [SMALLEST, SMALLEST]),  # torch's would be zero at last
        ("torch", {"init_scale": 2.0**127, "growth_interval": 1}, "..", [2.0**127, 2.0**127]),
        ("static", {"init_scale": 128.0}, "X..X", [128, 128, 128, 128]),
    ],
)
def test_sequence(rule: str, settings: dict[str, Any], steps: str, expected: list[float] | None) -> None:
    expected = [100.0 * 0.1, 100.0 * 0.1 * 1.5] if expected is None else expected
    assert replay(LossScale(find_rule(rule, **settings)), steps) == expected


@pytest.mark.parametrize("seed", range(5))
def test_torchs_rule_is_torchs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = "".join(".X"[int(flag)] for flag in torch.rand(200, generator=generator) < 0.2)
    scale, tracker, expected = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32), []
    for step in steps:
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(step == "X")), 2.0, 0.5, 3)
        expected.append(scale.item())
    assert replay(LossScale(find_rule("torch", growth_interval=3)), steps) == expected


def test_raising_at_the_minimum() -> None:
    scale = LossScale(find_rule("deepspeed", init_scale=2.0, hysteresis=1))
    assert replay(scale, "X") == [1.0]
    with pytest.raises(RuntimeError, match=r"smallest loss scale, 1.0, got.*raise_at_min_scale=False"):
        scale.update(True)


# ----------------------------------------------------------------------- state


@pytest.mark.parametrize("rule", ["torch", "deepspeed", "static"])
def test_a_run_that_is_stopped_goes_on_as_if_it_were_not(rule: str) -> None:
    settings = {} if rule == "static" else {"growth_interval": 2, "hysteresis": 3, **QUIET}
    steps = "X..X...XX.....X.XXX...."
    whole = replay(LossScale(find_rule(rule, **settings)), steps)
    for stop in range(len(steps)):
        first, second = LossScale(find_rule(rule, **settings)), LossScale(find_rule(rule, **settings))
        begun = replay(first, steps[:stop])
        second.load_state_dict(first.state_dict())
        assert begun + replay(second, steps[stop:]) == whole


def torchs() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3, growth_factor=4.0)


def test_state_of_torchs_scaler_and_back() -> None:
    theirs, ours = torchs(), LossScale(find_rule("torch"))
    theirs.load_state_dict({**theirs.state_dict(), "_growth_tracker": 2})
    ours.load_state_dict(theirs.state_dict())
    assert replay(ours, "...") == [256, 256, 256]  # factor and interval came with it
    back = torchs()
    back.load_state_dict(ours.state_dict())
    assert back.state_dict() == {**theirs.state_dict(), "scale": 256.0, "_growth_tracker": 2}


def test_state_of_another_rule_brings_the_scale_but_not_its_settings() -> None:
    ours = LossScale(find_rule("deepspeed", growth_interval=2))
    ours.load_state_dict({**torchs().state_dict(), "_growth_tracker": 1})
    assert replay(ours, "...") == [128, 128, 256]
    static = LossScale(find_rule("static", init_scale=8.0))
    static.load_state_dict(torchs().state_dict())
    assert static.value == 8.0


DEEPSPEED = {"cur_scale": 512.0, "cur_iter": 9, "last_overflow_iter": 5, "scale_factor": 2.0, "scale_window": 4}


@pytest.mark.parametrize(
    "state",
    [
        {"dynamic_loss_scale": True, **DEEPSPEED},
        {"loss_scaler": SimpleNamespace(**DEEPSPEED), "overflow": False},
        {"loss_scaler": DEEPSPEED},
    ],
    ids=["numbers", "object", "mapping"],
)
def test_state_of_deepspeeds_scaler(state: dict[str, Any]) -> None:
    ours = LossScale(find_rule("deepspeed"))
    ours.load_state_dict(state)
    # After the overflow of step 5 the scale grows in the steps 10, 14, 18: those whose distance from 6 is 4, 8, 12.
    assert replay(ours, "." * 10) == [512, 1024, 1024, 1024, 1024, 2048, 2048, 2048, 2048, 4096]


def test_hysteresis_of_deepspeeds_scaler() -> None:
    ours = LossScale(find_rule("deepspeed", hysteresis=3))
    ours.load_state_dict({**DEEPSPEED, "delayed_shift": 3, "cur_hysteresis": 2})
    assert replay(ours, "XX") == [512, 256]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "got one without scale, growth_factor, .*it has nothing"),
        ({"scale": 2.0}, "got one without growth_factor"),
        ({"loss_scaler": {}}, "'cur_scale', got nothing"),
        ({**DEEPSPEED, "cur_scale": -1.0}, "positive and finite scale, got -1.0"),
        ({**DEEPSPEED, "cur_scale": math.nan}, "positive and finite scale, got nan"),
    ],
)
def test_states_that_are_none(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossScale(find_rule("torch")).load_state_dict(state)


# ------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("rule", "settings", "kind", "message"),
    [
        ("apex", {}, ValueError, "one of torch, deepspeed, static, got 'apex'"),
        *[
            ("deepspeed", {name: value}, ValueError, f"Expected {name} to be .* got {re.escape(str(value))}")
            for name, values in {
                "init_scale": [0, -2.0, math.inf, math.nan, 2 * LARGEST],
                "min_scale": [0, -1.0, math.nan],
                "growth_interval": [0, -1],
                "hysteresis": [0, -1],
                "warm_up": [-1],
                "growth_factor": [1.0, 0.5, -2.0, math.inf, math.nan],
                "backoff_factor": [1.0, 0.0, -0.5, math.nan],
            }.items()
            for value in values
        ],
        ("deepspeed", {"init_scale": 0.5}, ValueError, "min_scale to be at most init_scale, got 1.0 and 0.5"),
        ("torch", {"growth_interval": 2.5}, TypeError, "growth_interval to be an integer, got 2.5"),
        ("torch", {"init_scale": "auto"}, TypeError, "init_scale to be a number, got 'auto'"),
        ("torch", {"window": 2}, TypeError, "settings out of .*growth_interval.*, got window"),
        ("static", {"hysteresis": 2}, ValueError, "only init_scale for rule='static', got hysteresis"),
    ],
)
def test_bad_settings(rule: str, settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        find_rule(rule, **settings)
