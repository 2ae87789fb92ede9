"""Averages under hybrid shard: two copies of the state on four ranks, each of which averages its part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from averaging import Counting, assert_same, fit, library
from models import assert_close
from torch.optim.swa_utils import get_ema_avg_fn

from harness import Ranks
from opened import opened

pytestmark = pytest.mark.matrix

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("WeightAveraging", {}),
    "function": ("WeightAveraging", {"avg_fn": get_ema_avg_fn(0.8), "use_buffers": False}),
    "moving": ("EMAWeightAveraging", {"decay": 0.8, "update_every_n_steps": 3, "update_starting_at_step": 4}),
    "stochastic": ("StochasticWeightAveraging", {"swa_lrs": 0.05, "swa_epoch_start": 3, "annealing_epochs": 4}),
}


def average(kind: str, strategy: str) -> pl.Callback:
    name, arguments = KINDS[kind]
    return getattr(library(strategy), name)(**arguments)


def fit_kind(strategy: str, kind: str, **arguments: Any) -> Any:
    return fit(strategy, functools.partial(average, kind), **arguments)


@pytest.fixture(scope="module")
def ranks4(ranks_of: Callable[[int], Ranks]) -> Ranks:
    return ranks_of(4)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_equals_lightnings_own(ranks4: Ranks, kind: str) -> None:
    expected = fit_kind("auto", kind)
    for result in ranks4.run(fit_kind, "hybrid", kind):
        assert_same(result, expected)


@pytest.mark.parametrize("kind", ["moving", "stochastic"])
def test_stop_and_resume_is_exactly_an_uninterrupted_run(ranks4: Ranks, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    ranks4.run(fit_kind, "hybrid", kind, save=path, stop_after=7)
    resumed = ranks4.run(fit_kind, "hybrid", kind, ckpt_path=path)
    for result, uninterrupted in zip(resumed, ranks4.run(fit_kind, "hybrid", kind), strict=True):
        assert_same(result, uninterrupted, tolerance=0)


@pytest.mark.parametrize("kind", ["moving", "stochastic"])
def test_the_checkpoint_is_lightnings_and_either_continues_from_it(ranks4: Ranks, kind: str, tmp_path: Path) -> None:
    fit_kind("auto", kind, save=tmp_path / "alone.ckpt", stop_after=7)
    ranks4.run(fit_kind, "hybrid", kind, save=tmp_path / "ranks.ckpt", stop_after=7)
    theirs, ours = (opened(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("alone", "ranks"))
    if kind == "stochastic":
        key = "StochasticWeightAveraging"
        pairs = [(saved["callbacks"][key].pop("average_model_state"), saved["state_dict"]) for saved in (ours, theirs)]
        assert ours["callbacks"][key]["n_averaged"] == theirs["callbacks"][key]["n_averaged"]
    else:
        pairs = [(saved["state_dict"], saved["current_model_state"]) for saved in (ours, theirs)]
        assert ours["averaging_state"] == theirs["averaging_state"]
    names = {name for name, _ in Counting().named_parameters()}  # SWA leaves an average's buffers as they were
    for actual, expected in zip(*pairs, strict=True):
        assert_close({name: actual[name] for name in names}, {name: expected[name] for name in names})
    expected_end = fit_kind("auto", kind)
    assert_same(fit_kind("auto", kind, ckpt_path=tmp_path / "ranks.ckpt"), expected_end)
    for result in ranks4.run(fit_kind, "hybrid", kind, ckpt_path=tmp_path / "alone.ckpt"):
        assert_same(result, expected_end)
