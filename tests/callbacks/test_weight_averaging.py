"""Weight averaging under each row equals Lightning's own callback in a single process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from averaging import CONTINUATIONS, EPOCHS, Counting, Recording, assert_same, everything, fit, library, make
from models import ROWS, ArriveLate, assert_close, loader, on, trainer
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn

from harness import Ranks
from lightning_accel import callbacks
from opened import opened
from rows import everyday

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("WeightAveraging", {}),
    "function": ("WeightAveraging", {"avg_fn": get_ema_avg_fn(0.8), "use_buffers": False}),
    "functions": ("WeightAveraging", {"multi_avg_fn": get_ema_multi_avg_fn(0.8), "device": "cpu"}),
    "moving": ("EMAWeightAveraging", {"decay": 0.8}),
    "some steps": ("EMAWeightAveraging", {"decay": 0.8, "update_every_n_steps": 3, "update_starting_at_step": 4}),
    "epochs": ("EMAWeightAveraging", {"decay": 0.8, "update_every_n_steps": 0, "update_starting_at_epoch": 2}),
}


def average(kind: str, strategy: str) -> pl.Callback:
    name, arguments = KINDS[kind]
    return getattr(library(strategy), name)(**arguments)


def fit_kind(strategy: str, kind: str, **arguments: Any) -> Any:
    return fit(strategy, functools.partial(average, kind), val_check_interval=2, **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", everyday(ROWS))
def test_fit_equals_lightnings_own(ranks2: Ranks, row: str, kind: str) -> None:
    expected = fit_kind("auto", kind)
    assert len(expected[1]) == 2 * EPOCHS
    for result in ranks2.run(fit_kind, row, kind):
        assert_same(result, expected)


def fit_with_the_slowest_network(row: str) -> Any:
    module = Counting()
    arguments: dict[str, Any] = {"max_epochs": 3, "callbacks": [average("moving", row), ArriveLate()]}
    make(row, **arguments).fit(module, loader(), loader(size=16))
    return everything(module)


@pytest.mark.parametrize("row", everyday(["zero1", "fsdp"]))
def test_nobody_sees_averages_before_they_arrive(ranks2: Ranks, row: str) -> None:
    expected = fit_with_the_slowest_network("auto")
    for result in ranks2.run(fit_with_the_slowest_network, row):
        assert_close(result, expected)


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("kind", ["mean", pytest.param("function", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_stop_and_resume_is_exactly_an_uninterrupted_run(ranks2: Ranks, row: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    ranks2.run(fit_kind, row, kind, save=path, max_epochs=5)
    resumed = ranks2.run(fit_kind, row, kind, ckpt_path=path)
    for result, uninterrupted in zip(resumed, ranks2.run(fit_kind, row, kind), strict=True):
        # No tolerance: the same numbers are added in the same order.
        assert_same(result, uninterrupted, tolerance=0)


@pytest.mark.parametrize(("before", "after"), everyday(CONTINUATIONS))
def test_fit_continues_from_a_checkpoint_of_any_strategy(
    ranks2: Ranks, before: str, after: str, tmp_path: Path
) -> None:
    path = tmp_path / "stopped.ckpt"
    on(before, ranks2, fit_kind, before, "moving", save=path, max_epochs=5)
    for result in on(after, ranks2, fit_kind, after, "moving", ckpt_path=path):
        assert_same(result, fit_kind("auto", "moving"))


@pytest.mark.parametrize("row", everyday(ROWS))
def test_checkpoint_is_the_one_that_lightning_writes(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    fit_kind("auto", "moving", save=tmp_path / "alone.ckpt", max_epochs=3)
    ranks2.run(fit_kind, row, "moving", save=tmp_path / "ranks.ckpt", max_epochs=3)
    expected = opened(tmp_path / "alone.ckpt")
    actual = opened(tmp_path / "ranks.ckpt")
    assert actual.keys() == expected.keys() | {"lightning_accel"}
    assert_close(actual["state_dict"], expected["state_dict"])
    assert_close(actual["current_model_state"], expected["current_model_state"])
    assert actual["averaging_state"] == expected["averaging_state"]
    assert actual["callbacks"] == expected["callbacks"]


def evaluate(strategy: str, path: Path) -> Any:
    """Losses and predictions of a checkpoint, with and without the callback."""
    found = []
    for callbacks_used in ([], [average("moving", strategy)]):
        module = Counting(seed=1)
        used = make(strategy, callbacks=callbacks_used)
        validated = used.validate(module, loader(), ckpt_path=path, verbose=False)
        tested = used.test(module, loader(), ckpt_path=path, verbose=False)
        predicted = used.predict(module, loader(), ckpt_path=path)
        mean = used.strategy.reduce(torch.cat(predicted).mean(), reduce_op="mean")
        found += [validated[0]["val_loss"], tested[0]["test_loss"], mean.item()]
    return found


@pytest.mark.parametrize("row", everyday(ROWS))
def test_evaluation_of_a_checkpoint_uses_the_average(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    path = tmp_path / "averaged.ckpt"
    ranks2.run(fit_kind, row, "moving", save=path, max_epochs=3)
    expected = evaluate("auto", path)
    assert expected[:3] == expected[3:]
    for result in ranks2.run(evaluate, row, path):
        assert result == pytest.approx(expected, rel=1e-12)


def save_later(row: str, folder: Path) -> None:
    module = Counting()
    used = make(row, max_epochs=2, callbacks=[average("mean", row), SaveWithinValidation(folder / "within.ckpt")])
    used.fit(module, loader(), loader(size=16))
    used.save_checkpoint(folder / "after.ckpt")


class SaveWithinValidation(Recording):
    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path.with_name("end.ckpt"))


@pytest.mark.parametrize("row", everyday(ROWS))
def test_saving_within_validation_and_after_fit(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    ranks2.run(save_later, row, tmp_path)
    within, end, after = (opened(tmp_path / f"{name}.ckpt") for name in ("within", "end", "after"))
    for key in ("state_dict", "current_model_state"):
        assert_close(within[key], end[key], tolerance=0)
        assert_close(after[key], end["state_dict"], tolerance=0)
    assert within["averaging_state"] == end["averaging_state"] == after["averaging_state"] == {"n_averaged": 8}
    assert (within["state_dict"]["net.first.weight"] != within["current_model_state"]["net.first.weight"]).all()


def resume_without_average(row: str, path: Path) -> Any:
    fit(row, lambda _: pl.Callback(), save=path, max_epochs=2)
    return fit_kind(row, "moving", ckpt_path=path, max_epochs=4)


@pytest.mark.parametrize("row", [pytest.param("zero2", marks=pytest.mark.matrix), "fsdp"])
def test_resume_from_a_checkpoint_without_an_average(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    expected = resume_without_average("auto", tmp_path / "alone.ckpt")
    for result in ranks2.run(resume_without_average, row, tmp_path / "ranks.ckpt"):
        assert_same(result, expected)


class Renaming(Counting):
    def state_dict(self, *arguments: Any, **more: Any) -> dict[str, Any]:
        return {f"my.{name}": value for name, value in super().state_dict(*arguments, **more).items()}


def save_renamed(row: str, path: Path) -> None:
    make(row, callbacks=[average("moving", row), Recording(path)]).fit(Renaming(), loader())


def test_renamed_parameters_are_an_error(ranks2: Ranks, tmp_path: Path) -> None:
    found = ranks2.run_expecting_error(save_renamed, "zero1", tmp_path / "renamed.ckpt")
    first = next(error for error in found if error is not None)  # the one that has written
    assert "'net.first.weight' is missing and 'my.seen' is no parameter" in first[1]


# ------------------------------------------------------------------ thawing


class Thawing(pl.callbacks.BaseFinetuning):
    """Trains the blocks from the third epoch on."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.net.blocks)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net.blocks, optimizer, lr=0.01)


class TrainingThawed(Counting):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def finetune(strategy: str) -> Any:
    module = TrainingThawed()
    recording = Recording()
    used = make(strategy, max_epochs=5, callbacks=[Thawing(), average("moving", strategy), recording])
    used.fit(module, loader(), loader(size=16))
    return everything(module), recording.losses, recording.rates


@pytest.mark.parametrize("row", everyday(ROWS))
def test_thawed_parameters_join_the_average(ranks2: Ranks, row: str) -> None:
    expected = finetune("auto")
    for result in ranks2.run(finetune, row):
        assert_same(result, expected)


class Tuned(Counting):
    """With a learning rate where Lightning's tuner looks for one."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.02


def tune(strategy: str, folder: Path) -> Any:
    """The tuner saves a checkpoint, trains, and loads it again, all within fit."""
    module = Tuned()
    recording = Recording()
    finder = pl.callbacks.LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    used = make(
        strategy, max_epochs=3, default_root_dir=folder, callbacks=[average("moving", strategy), finder, recording]
    )
    used.fit(module, loader(), loader(size=16))
    return everything(module), recording.losses, recording.rates


@pytest.mark.parametrize("row", everyday(["zero1", "fsdp"]))
def test_the_learning_rate_finder_leaves_no_trace(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    expected = tune("auto", tmp_path / "alone")
    for result in ranks2.run(tune, row, tmp_path / "ranks"):
        assert_same(result, expected)


# ------------------------------------------------------------------ other strategies and classes


def fit_elsewhere(average: pl.Callback, strategy: str, devices: int) -> Any:
    module = Counting()
    recording = Recording()
    used = trainer(strategy, devices=devices, max_epochs=3, callbacks=[average, recording])
    used.fit(module, loader(), loader(size=16))
    return everything(module), recording.losses, recording.rates


def fit_ddp() -> Any:
    return fit_elsewhere(callbacks.EMAWeightAveraging(decay=0.8), "ddp", 2)


def test_under_other_strategies_they_are_lightnings_own(ranks2: Ranks) -> None:
    expected = fit_elsewhere(pl.callbacks.EMAWeightAveraging(decay=0.8), "auto", 1)
    assert_same(fit_elsewhere(callbacks.EMAWeightAveraging(decay=0.8), "auto", 1), expected)
    for result in ranks2.run(fit_ddp):
        assert_same(result, expected)


def test_ours_are_lightnings_by_class_and_by_the_key_of_their_state() -> None:
    for name in ("WeightAveraging", "EMAWeightAveraging"):
        ours, theirs = getattr(callbacks, name), getattr(pl.callbacks, name)
        assert issubclass(ours, theirs)
        assert ours().state_key == theirs().state_key


def test_functions_beside_a_decay_are_refused() -> None:
    with pytest.raises(ValueError, match="got avg_fn"):
        callbacks.EMAWeightAveraging(avg_fn=get_ema_avg_fn())
