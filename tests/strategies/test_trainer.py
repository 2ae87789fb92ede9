"""What a Trainer user expects of a strategy, under each row: Lightning's features, and a single process's numbers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from models import (
    FLOAT64,
    REPLICATED,
    ROWS,
    ArriveLate,
    Data,
    Regression,
    SaveAtEnd,
    assert_close,
    fit,
    loader,
    make,
    trainer,
    values,
)
from torch import Tensor

from harness import Ranks
from lightning_accel.strategies import AccelZeROStrategy
from opened import opened
from rows import everyday

SUFFIXES = ["", "_spawn", "_fork", "_notebook"]
CLASS = f"{AccelZeROStrategy.__module__}.{AccelZeROStrategy.__qualname__}"


@pytest.mark.parametrize("registry", [StrategyRegistry, STRATEGY_REGISTRY], ids=["trainer", "fabric"])
def test_every_name_is_registered(registry: Any) -> None:
    assert {f"accel_{row}{suffix}" for row in ROWS for suffix in SUFFIXES} <= set(registry.available_strategies())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("row", everyday(ROWS))
def test_a_name_stands_for_its_row(row: str, suffix: str) -> None:
    strategy = StrategyRegistry.get(f"accel_{row}{suffix}")
    assert strategy.row.name == row
    assert strategy._start_method == {"": "popen", "_spawn": "spawn"}.get(suffix, "fork")


def run_cli(options: list[str]) -> tuple[Any, dict[str, Tensor]]:
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    arguments = ["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.devices=2", *quiet, *options]
    cli = LightningCLI(Regression, Data, args=arguments, save_config_callback=None)
    strategy = cli.trainer.strategy
    return (strategy.row.name, strategy._options.bucket_cap_mb, strategy._options.units), values(cli.model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainer.strategy=accel_zero2"], ("zero2", 25.0, None)),
        ([f'--trainer.strategy={{"class_path": "{CLASS}"}}'], ("zero2", 25.0, None)),
        (
            [
                f"--trainer.strategy={CLASS}",
                "--trainer.strategy.stage=1",
                "--trainer.strategy.bucket_cap_mb=0.5",
                "--trainer.strategy.units=[net.first,net.last]",
            ],
            ("zero1", 0.5, ["net.first", "net.last"]),
        ),
        (
            [
                f'--trainer.strategy={{"class_path": "{CLASS}", "init_args": {{"stage": 1, "bucket_cap_mb": 2.0, '
                '"process_group_backend": "gloo"}}'
            ],
            ("zero1", 2.0, None),
        ),
    ],
    ids=["name", "class", "class with options", "class path with init args"],
)
def test_lightning_cli(ranks2: Ranks, options: list[str], expected: Any) -> None:
    for strategy, parameters in ranks2.run(run_cli, options):
        assert strategy == expected
        assert_close(parameters, fit("auto"))


# ---------------------------------------------------------------------- fitting


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accumulate_grad_batches": 3},  # 4 batches an epoch: the last step of an epoch is over one batch only
        {"gradient_clip_val": 0.3},
        {"gradient_clip_val": 0.03, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
    ],
    ids=["plain", "accumulated", "norm clipped", "value clipped"],
)
@pytest.mark.parametrize("row", everyday(ROWS))
def test_fit_equals_a_single_process(ranks2: Ranks, row: str, arguments: dict[str, Any]) -> None:
    expected = fit("auto", max_epochs=3, **arguments)
    for result in ranks2.run(fit, row, max_epochs=3, **arguments):
        assert_close(result, expected)


@pytest.mark.parametrize("row", ["zero1", "zero2"])
def test_nobody_sees_parameters_before_they_arrive(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_epochs": 2, "gradient_clip_val": 0.3}
    expected = fit("auto", **arguments)
    callbacks = [ArriveLate(), SaveAtEnd(tmp_path / "late.ckpt")]
    for result in ranks2.run(fit, row, callbacks=callbacks, **arguments):
        assert_close(result, expected)
    assert_close(opened(tmp_path / "late.ckpt")["state_dict"], expected)


def fit_on_one_device(strategy: str, **arguments: Any) -> dict[str, Tensor]:
    module = Regression()
    used = trainer(f"accel_{strategy}", devices=1, max_epochs=2, **arguments)
    used.fit(module, datamodule=Data())  # asks for the loader when there is a process group
    return values(module)


@pytest.mark.parametrize("row", everyday(ROWS))
def test_one_device(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)  # and what Lightning sets is taken back
    try:
        result = fit_on_one_device(row, gradient_clip_val=0.3, accumulate_grad_batches=2)
    finally:
        dist.destroy_process_group()
    assert_close(result, fit("auto", max_epochs=2, gradient_clip_val=0.3, accumulate_grad_batches=2))


def scheduler_warnings(row: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(row, devices=dist.get_world_size()).fit(Regression(), loader(size=24))
    return [str(warning.message) for warning in caught if "lr_scheduler" in str(warning.message)]


@pytest.mark.parametrize("row", everyday(ROWS))
def test_learning_rate_schedulers_do_not_complain(ranks3: Ranks, row: str) -> None:
    # "Detected call of `lr_scheduler.step()` before `optimizer.step()`": they look at the method that is replaced.
    assert ranks3.run(scheduler_warnings, row) == [[], [], []]


def watched(strategy: str, folder: Path) -> dict[str, Any]:
    """A fit with the callbacks that most users have, and what they noted."""
    module = Regression(lr=0.2)  # too much: the validation loss rises soon
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", monitor="val_loss", save_top_k=2)
    stopping = EarlyStopping("val_loss", patience=2)
    rates = LearningRateMonitor("step")
    logger = CSVLogger(folder)
    trainer = make(
        strategy,
        max_epochs=30,
        callbacks=[checkpoint, stopping, rates],
        enable_checkpointing=True,
        logger=logger,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader(), loader(size=16))
    return {
        "epochs": trainer.current_epoch,
        "stopped": stopping.stopped_epoch,
        "best": Path(checkpoint.best_model_path).name,
        "rates": rates.lrs,
        "scores": torch.stack([*checkpoint.best_k_models.values()]).sort().values,
    }


@pytest.mark.parametrize("row", everyday(ROWS))
def test_checkpoint_early_stopping_and_learning_rate_callbacks(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    expected = watched("auto", tmp_path / "alone")
    files = sorted(path.name for path in (tmp_path / "alone").glob("*.ckpt"))
    assert 3 < expected["epochs"] < 30  # the run is one in which the callbacks have something to say
    for result in ranks2.run(watched, row, tmp_path / "ranks"):
        torch.testing.assert_close(result.pop("scores"), expected["scores"], rtol=FLOAT64, atol=0)
        assert result == {key: value for key, value in expected.items() if key != "scores"}
    assert sorted(path.name for path in (tmp_path / "ranks").glob("*.ckpt")) == files


def fit_twice(strategy: str, same_trainer: bool) -> list[dict[str, Tensor]]:
    module = Regression()
    trainer = make(strategy)
    trainer.fit(module, loader())
    first = values(module)
    if same_trainer:
        trainer.fit_loop.max_epochs = 2
    else:
        trainer = make(strategy)
    trainer.fit(module, loader())
    return [first, values(module)]


@pytest.mark.parametrize("same_trainer", [False, True], ids=["another trainer", "same trainer"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_second_fit_in_the_same_process(ranks2: Ranks, row: str, same_trainer: bool) -> None:
    expected = fit_twice("auto", same_trainer)
    for result in ranks2.run(fit_twice, row, same_trainer):
        assert_close(result[0], expected[0])
        assert_close(result[1], expected[1])


class Raising(Regression):
    """Raises in the middle of an epoch, between forward and backward of its third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            raise LookupError("no more data")
        return loss


def fail_and_fit_again(row: str, folder: Path) -> dict[str, Tensor]:
    module = Raising()
    save = OnExceptionCheckpoint(folder)
    with pytest.raises(LookupError):
        make(row, callbacks=[save], enable_checkpointing=True).fit(module, loader())
    assert_close(values(module), opened(folder / "on_exception.ckpt")["state_dict"], 0)
    return fit(row)


@pytest.mark.parametrize("row", REPLICATED)
def test_fit_after_one_that_failed_on_all_ranks(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    for result in ranks2.run(fail_and_fit_again, row, tmp_path):
        assert_close(result, fit("auto"))
    saved = opened(tmp_path / "on_exception.ckpt")
    assert saved["global_step"] == 2
    assert len(saved["optimizer_states"][0]["state"]) == 10  # of all parameters


# ---------------------------------------------------------------------- evaluation


def evaluate(strategy: str, folder: Path) -> tuple[list[Any], Tensor]:
    module = Regression(lr=0.2)
    best = ModelCheckpoint(folder, monitor="val_loss")
    trainer = make(strategy, max_epochs=4, callbacks=[best], enable_checkpointing=True)
    trainer.fit(module, loader(), loader(size=16))
    metrics = [trainer.validate(module, loader()), trainer.test(module, loader(), ckpt_path="best")]
    return metrics, torch.stack(trainer.predict(module, loader()))


@pytest.mark.parametrize("row", everyday(ROWS))
def test_validate_test_and_predict_after_fit(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    expected_metrics, expected = evaluate("auto", tmp_path / "alone")
    for rank, (metrics, predictions) in enumerate(ranks2.run(evaluate, row, tmp_path / "ranks")):
        assert metrics[0] == [pytest.approx(expected_metrics[0][0], rel=FLOAT64)]
        assert metrics[1] == [pytest.approx(expected_metrics[1][0], rel=FLOAT64)]
        torch.testing.assert_close(predictions, expected[:, rank::2], rtol=FLOAT64, atol=FLOAT64)


def validate_only(strategy: str) -> dict[str, Any]:
    module = Regression(seed=0 if strategy == "auto" else dist.get_rank())  # rank 0's values are what counts
    return dict(make(strategy).validate(module, loader())[0])


def test_validate_without_fit_uses_the_weights_of_rank_0(ranks2: Ranks) -> None:
    expected = validate_only("auto")
    assert ranks2.run(validate_only, "zero2") == [pytest.approx(expected, rel=FLOAT64)] * 2
