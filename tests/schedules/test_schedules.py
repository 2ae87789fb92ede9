"""The schedules against values that DeepSpeed has made, live where it is installed, and as torch's schedulers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_accel import schedules
from lightning_accel.schedules import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR
from schedules.settings import CHOSEN, SETTINGS, STEPS, flat, make_optimizer, run, values

TABLE = json.loads((Path(__file__).parent / "deepspeed_values.json").read_text())["values"]


def ours(name: str) -> type[Any]:
    return getattr(schedules, SETTINGS[name][0])


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # total_num_steps below warmup_num_steps, no betas
        return function(*args)


def differing(found: Any, expected: Any) -> int:
    """How many numbers differ by more than the order of operations explains."""
    pairs = list(zip(flat(found), flat(expected), strict=True))
    return sum(not math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-17) for a, b in pairs)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_step_has_what_it_has_with_deepspeed(name: str) -> None:
    found = quietly(values, name, ours(name))
    chosen = [found[k - 1] for k in CHOSEN]
    assert [int(k) for k in TABLE[name]] == CHOSEN
    assert differing(chosen, list(TABLE[name].values())) == 0
    assert len(set(flat([[rate for rate, _ in groups] for groups in chosen]))) > 1, "a schedule that sets nothing"
    assert differing(found[1:], found[:-1]), "one step more or less would not be noticed"


@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs DeepSpeed, which is not installed (extra `deepspeed`)"
)
@pytest.mark.timeout(900)  # to import it takes longer than anything else here
@pytest.mark.parametrize("name", SETTINGS)
def test_all_steps_have_what_they_have_with_the_deepspeed_here(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime import lr_schedules

    expected = values(name, getattr(lr_schedules, SETTINGS[name][0]))
    found = quietly(values, name, ours(name))
    assert len(found) == STEPS
    assert differing(found, expected) == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_resumes_by_its_state(name: str) -> None:
    whole = quietly(values, name, ours(name))
    optimizer = make_optimizer(name)
    schedule = quietly(lambda: ours(name)(optimizer, **SETTINGS[name][1]))
    run(optimizer, schedule, 60)
    saved = json.loads(json.dumps(schedule.state_dict()))  # numbers and lists only
    weights, last = optimizer.state_dict(), schedule.get_last_lr()
    again = make_optimizer(name)
    resumed = quietly(lambda: ours(name)(again, **SETTINGS[name][1]))
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert resumed.get_last_lr() == last == [group["lr"] for group in again.param_groups]
    assert differing(run(again, resumed, STEPS - 60), whole[60:]) == 0


@pytest.mark.parametrize("name", ["range quick", "cycle decay", "warm-up", "decay", "cosine"])
def test_resumes_from_what_deepspeed_has_saved_and_by_the_number_of_a_batch(name: str) -> None:
    kind, settings, *_ = SETTINGS[name]
    whole = values(name, ours(name))
    optimizer = make_optimizer(name)
    run(optimizer, ours(name)(optimizer, **settings), 60)
    weights = optimizer.state_dict()
    for by_number in (False, True):
        again = make_optimizer(name)
        if by_number:
            again.load_state_dict(weights)
            resumed = ours(name)(again, **settings, last_batch_iteration=59)
        else:
            resumed = ours(name)(again, **settings)
            again.load_state_dict(weights)
            resumed.load_state_dict({"last_batch_iteration": 59})
        assert [resumed.last_epoch, resumed.get_last_lr()] == [60, [rate for rate, _ in whole[60]]]
        assert differing(run(again, resumed, STEPS - 60), whole[60:]) == 0


def test_no_warnings_where_steps_are_in_torchs_order() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values("cosine", WarmupCosineLR, 3)
    optimizer = make_optimizer("warm-up")
    schedule = WarmupLR(optimizer)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()


def test_works_within_torchs_own_schedules() -> None:
    optimizer = make_optimizer("cycle")
    first = WarmupLR(optimizer, warmup_num_steps=10, warmup_type="linear")
    then = OneCycle(optimizer, **SETTINGS["cycle"][1])
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, then], milestones=[20])
    found = run(optimizer, both, 60)
    cycle = values("cycle", OneCycle)
    assert [found[k][0][0] for k in (0, 6, 15)] == pytest.approx([0.0, 0.05, 0.1])
    assert [entry[0][0] for entry in found[20:]] == pytest.approx([entry[0][0] for entry in cycle[:40]])
    assert [entry[0][1] for entry in found[21:]] == [entry[0][1] for entry in cycle[1:40]]


def test_a_learning_rate_that_is_a_tensor_stays_one() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=rate)
    schedule = WarmupLR(optimizer, warmup_num_steps=4, warmup_type="linear")
    run(optimizer, schedule, 3)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.05)
    assert schedule.base_lrs == [pytest.approx(0.1)]


def test_reading_the_rate_changes_no_momentum() -> None:
    optimizer = make_optimizer("cycle")
    schedule = OneCycle(optimizer, 0.1, 1.0)
    optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    quietly(schedule.get_lr)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)


def test_a_momentum_that_grows_to_one_is_an_error() -> None:
    optimizer = make_optimizer("cycle")
    schedule = OneCycle(
        optimizer, 0.1, 1.0, cycle_first_step_size=2, decay_step_size=1, decay_lr_rate=0.1, decay_mom_rate=0.05
    )
    with pytest.raises(ValueError, match=r"below 1, got \[1.03.*after 7 steps: decay_mom_rate=0.05"):
        run(optimizer, schedule, 10)


def test_what_deepspeed_warns_of_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="SGD has no betas"):
        OneCycle(make_optimizer("range"), 0.1, 1.0)
    for make in (WarmupDecayLR, WarmupCosineLR):
        with pytest.warns(UserWarning, match="total_num_steps=5 is less than warmup_num_steps=10"):
            make(make_optimizer("decay"), 5, warmup_num_steps=10)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (LRRangeTest, {"lr_range_test_step_size": 0}, "lr_range_test_step_size to be an integer of at least 1, got 0"),
        (LRRangeTest, {"lr_range_test_min_lr": [0.1, 0.2]}, "one for each of the 1 parameter groups, got 2"),
        (LRRangeTest, {"lr_range_test_min_lr": -1}, "lr_range_test_min_lr to be a number of at least 0, got -1"),
        (LRRangeTest, {"lr_range_test_step_rate": math.nan}, "lr_range_test_step_rate to be a number"),
        (
            OneCycle,
            {"cycle_min_lr": "auto", "cycle_max_lr": 1},
            "cycle_min_lr to be a number of.*, got 'auto'",
        ),
        (OneCycle, {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_first_step_size": 0}, "to be above 0"),
        (OneCycle, {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_second_step_size": -1}, "cycle_second_step_size"),
        (OneCycle, {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_first_stair_count": 1.5}, "to be an integer"),
        (OneCycle, {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_max_mom": 1.0}, "cycle_max_mom to be below 1"),
        (WarmupLR, {"warmup_num_steps": 2.5}, "warmup_num_steps to be an integer of at least 1, got 2.5"),
        (WarmupLR, {"warmup_type": "cosine"}, "warmup_type to be 'log' or 'linear', got 'cosine'"),
        (WarmupDecayLR, {"total_num_steps": "auto"}, "total_num_steps to be a number of at least 1, got 'auto'"),
        (WarmupCosineLR, {"total_num_steps": 9, "cos_min_ratio": -0.1}, "cos_min_ratio"),
    ],
)
def test_bad_settings_are_told_before_anything_is_changed(make: Any, settings: dict[str, Any], message: str) -> None:
    optimizer = make_optimizer("range")
    with pytest.raises(ValueError, match=message):
        make(optimizer, **settings)
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(TypeError, match="Expected a torch.optim.Optimizer, got str"):
        LRRangeTest("optimizer")  # type: ignore[arg-type]
