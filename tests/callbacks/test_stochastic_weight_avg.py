"""Stochastic weight averaging under each row equals Lightning's own callback."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from averaging import CONTINUATIONS, Counting, assert_same, everything, fit, library, make
from models import ROWS, assert_close, loader, on, trainer
from torch import Tensor

from harness import Ranks
from lightning_accel import callbacks
from lightning_accel.core.average import Average
from opened import opened
from rows import everyday


def moving(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
    return 0.8 * averaged + 0.2 * current


KINDS: dict[str, dict[str, Any]] = {
    "cosine": {"swa_lrs": 0.05, "swa_epoch_start": 3, "annealing_epochs": 4},
    "linear": {"swa_lrs": [0.03], "swa_epoch_start": 0.5, "annealing_strategy": "linear", "annealing_epochs": 3},
    "function": {"swa_lrs": 0.01, "swa_epoch_start": 1, "avg_fn": moving, "device": None},
}


def average(kind: str, strategy: str) -> pl.Callback:
    return library(strategy).StochasticWeightAveraging(**KINDS[kind])


def fit_kind(strategy: str, kind: str, **arguments: Any) -> Any:
    return fit(strategy, functools.partial(average, kind), **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", everyday(ROWS))
def test_fit_equals_lightnings_own(ranks2: Ranks, row: str, kind: str) -> None:
    expected = fit_kind("auto", kind)
    assert len(set(expected[2])) > 4, "the schedule must be seen"
    for result in ranks2.run(fit_kind, row, kind):
        assert_same(result, expected)


# ------------------------------------------------------------------ BatchNorm's statistics


def fit_normed(strategy: str, average: pl.Callback) -> dict[str, Tensor]:
    module = Counting(norm=True)
    used = trainer(strategy, max_epochs=5, callbacks=[average])
    used.fit(module, loader(), loader(size=16))
    assert module.net.last[0].momentum == 0.1, "put back"
    assert used.fit_loop.max_epochs == 5
    return everything(module)


def fit_normed_by_lightning() -> dict[str, Tensor]:
    return fit_normed("ddp", pl.callbacks.StochasticWeightAveraging(**KINDS["cosine"]))


def fit_normed_by_us(row: str) -> dict[str, Tensor]:
    return fit_normed(f"accel_{row}", average("cosine", row))


@pytest.mark.parametrize("row", everyday(ROWS))
def test_statistics_are_updated_in_one_more_epoch(ranks2: Ranks, row: str) -> None:
    # Each rank normalises its own samples, so that torch's DDP and not a single process is the measure.
    expected, *_ = ranks2.run(fit_normed_by_lightning)
    assert expected["net.last.0.num_batches_tracked"] == 4
    for result in ranks2.run(fit_normed_by_us, row):
        assert_close(result, expected)


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("epochs", [1, 7], ids=["before it starts", "after"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_stop_and_resume_is_exactly_an_uninterrupted_run(ranks2: Ranks, row: str, epochs: int, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    ranks2.run(fit_kind, row, "cosine", save=path, stop_after=epochs)
    resumed = ranks2.run(fit_kind, row, "cosine", ckpt_path=path)
    for result, uninterrupted in zip(resumed, ranks2.run(fit_kind, row, "cosine"), strict=True):
        assert_same(result, uninterrupted, tolerance=0)


@pytest.mark.parametrize(("before", "after"), everyday(CONTINUATIONS))
@pytest.mark.parametrize("epochs", [1, 7], ids=["before it starts", "after"])
def test_fit_continues_from_a_checkpoint_of_any_strategy(
    ranks2: Ranks, before: str, after: str, epochs: int, tmp_path: Path
) -> None:
    path = tmp_path / "stopped.ckpt"
    on(before, ranks2, fit_kind, before, "cosine", save=path, stop_after=epochs)
    for result in on(after, ranks2, fit_kind, after, "cosine", ckpt_path=path):
        assert_same(result, fit_kind("auto", "cosine"))


@pytest.mark.parametrize("epochs", [1, 7], ids=["before it starts", "after"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_checkpoint_is_the_one_that_lightning_writes(ranks2: Ranks, row: str, epochs: int, tmp_path: Path) -> None:
    fit_kind("auto", "cosine", save=tmp_path / "alone.ckpt", stop_after=epochs)
    ranks2.run(fit_kind, row, "cosine", save=tmp_path / "ranks.ckpt", stop_after=epochs)
    expected, actual = (
        opened(tmp_path / f"{name}.ckpt", weights_only=False)["callbacks"]["StochasticWeightAveraging"]
        for name in ("alone", "ranks")
    )
    theirs, ours = expected.pop("average_model_state"), actual.pop("average_model_state")
    assert ours.keys() == theirs.keys()
    assert actual["n_averaged"] == expected["n_averaged"]
    assert actual["latest_update_epoch"] == expected["latest_update_epoch"]
    if epochs > 3:  # before, Lightning's has the model's first values
        parameters = {name for name, _ in Counting().named_parameters()}
        assert_close({n: ours[n] for n in parameters}, {n: theirs[n] for n in parameters})


# ------------------------------------------------------------------ no more than needed


class Sizes(pl.Callback):
    """Whether there is an average at the start of each epoch."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == 0:
            found = trainer.callbacks[0]._parts().average
            assert found is None or isinstance(found, Average)
            self.found.append(0 if found is None else found.nbytes)


def sizes(row: str) -> list[int]:
    used = trainer(f"accel_{row}", max_epochs=4, callbacks=[average("cosine", row), recording := Sizes()])
    used.fit(Counting(), loader())
    return recording.found


@pytest.mark.parametrize("row", everyday(ROWS))
def test_there_is_no_memory_before_the_first_average(ranks2: Ranks, row: str) -> None:
    for before, also_before, first, second in ranks2.run(sizes, row):
        assert before == also_before == 0
        assert first == second > 0


def train_too_shortly(strategy: str) -> Any:
    module = Counting()
    average = callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=5)
    make(strategy, max_epochs=2, callbacks=[average]).fit(module, loader())
    return everything(module)


@pytest.mark.parametrize("row", ["ddp", "fsdp"])
def test_a_run_that_ends_before_the_first_average_keeps_what_it_learned(ranks2: Ranks, row: str) -> None:
    module = Counting()
    make("auto", max_epochs=2).fit(module, loader())
    for result in ranks2.run(train_too_shortly, row):
        assert_close(result, everything(module))


def test_ours_is_lightnings_by_class_and_by_the_key_of_its_state(ranks2: Ranks) -> None:
    ours, theirs = callbacks.StochasticWeightAveraging, pl.callbacks.StochasticWeightAveraging
    assert issubclass(ours, theirs)
    assert ours(0.1).state_key == theirs(0.1).state_key
    module = Counting()
    make("auto", max_epochs=4, callbacks=[ours(**KINDS["cosine"])]).fit(module, loader())
    expected = Counting()
    make("auto", max_epochs=4, callbacks=[theirs(**KINDS["cosine"])]).fit(expected, loader())
    assert_close(everything(module), everything(expected), tolerance=0)
