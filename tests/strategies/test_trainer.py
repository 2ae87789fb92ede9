"""What a Trainer user expects of a strategy, under each row: Lightning's features, and a single process's numbers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from models import (
    FEATURES,
    FLOAT64,
    OUTPUTS,
    REPLICATED,
    ROWS,
    ArriveLate,
    Data,
    Regression,
    alone,
    assert_close,
    loader,
    trainer,
    values,
)
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from harness import Ranks, RanksError
from lightning_accel.strategies import AccelZeROStrategy
from rows import everyday

SUFFIXES = ["", "_spawn", "_fork", "_notebook"]
# Where a run can be stopped and where it can go on; "auto" is stock Lightning on one device.
CONTINUATIONS = [*[(row, row) for row in ROWS], ("zero2", "ddp"), ("ddp", "zero1")]
CONTINUATIONS += [*[(row, "auto") for row in ROWS], *[("auto", row) for row in ROWS]]


@pytest.mark.parametrize("registry", [StrategyRegistry, STRATEGY_REGISTRY], ids=["trainer", "fabric"])
def test_every_name_is_registered(registry: Any) -> None:
    assert {f"accel_{row}{suffix}" for row in ROWS for suffix in SUFFIXES} <= set(registry.available_strategies())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("row", everyday(ROWS))
def test_a_name_stands_for_its_row(row: str, suffix: str) -> None:
    strategy = StrategyRegistry.get(f"accel_{row}{suffix}")
    assert strategy.row.name == row
    assert strategy._start_method == {"": "popen", "_spawn": "spawn"}.get(suffix, "fork")


# ---------------------------------------------------------------------- fitting


def make(strategy: str, **arguments: Any) -> pl.Trainer:
    """A Trainer for a row in a rank, or for "auto" in pytest's process."""
    return alone(**arguments) if strategy == "auto" else trainer(f"accel_{strategy}", **arguments)


def fit(strategy: str, ckpt_path: Any = None, **arguments: Any) -> dict[str, Tensor]:
    module = Regression()
    make(strategy, **arguments).fit(module, loader(), ckpt_path=ckpt_path)
    return values(module)


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


class Zeroing(Regression):
    """Keeps gradients that are zero instead of none."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


class Shrinking(Regression):
    """Writes to its parameters after each step."""

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.99)


class Closing(Regression):
    """Two backwards through one graph, and a third in the optimizer's closure."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        output = self(batch[1])
        self.manual_backward((output**2).mean(), retain_graph=True)
        self.manual_backward(nn.functional.mse_loss(output, batch[2]))

        def closure() -> Tensor:
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)
        optimizer.zero_grad()


MODULES = {"zeroing": Zeroing, "shrinking": Shrinking, "closing": Closing, "scheduled": Regression, "tuned": Regression}


def fit_module(strategy: str, kind: str, folder: Path) -> dict[str, Tensor]:
    module = MODULES[kind]()
    callbacks: list[pl.Callback] = [ArriveLate()]
    if kind == "scheduled":
        callbacks.append(GradientAccumulationScheduler({0: 1, 1: 4, 2: 2}))
    if kind == "tuned":
        module.lr = 0.02
        callbacks.append(LearningRateFinder(num_training_steps=4, early_stop_threshold=None))
    used = make(strategy, max_epochs=3, callbacks=callbacks, default_root_dir=folder)
    used.fit(module, loader())
    return values(module)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("row", everyday(ROWS))
def test_unusual_modules_and_callbacks(ranks2: Ranks, row: str, kind: str, tmp_path: Path) -> None:
    if kind == "shrinking" and row not in REPLICATED:
        with pytest.raises(RanksError, match=r"net\.first\.weight.*rest sharded.*full_parameters"):
            ranks2.run(fit_module, row, kind, tmp_path / "ranks")
        return
    expected = fit_module("auto", kind, tmp_path / "alone")
    for result in ranks2.run(fit_module, row, kind, tmp_path / "ranks"):
        assert_close(result, expected)


@pytest.mark.parametrize("row", ["zero1", "zero2"])
def test_nobody_sees_parameters_before_they_arrive(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_epochs": 2, "gradient_clip_val": 0.3}
    expected = fit("auto", **arguments)
    callbacks = [ArriveLate(), SaveAtEnd(tmp_path / "late.ckpt")]
    for result in ranks2.run(fit, row, callbacks=callbacks, **arguments):
        assert_close(result, expected)
    assert_close(torch.load(tmp_path / "late.ckpt", weights_only=True)["state_dict"], expected)


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


class Optimized(Regression):
    """With an optimizer that is given by name, or with none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        if self.kind == "none":
            return None
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def fit_with_optimizer(strategy: str, kind: str) -> dict[str, Tensor]:
    module = Optimized(kind)
    make(strategy).fit(module, loader())
    return values(module)


@pytest.mark.parametrize(("row", "kind"), [("ddp", "lbfgs"), ("ddp", "none"), ("zero2", "none")])
def test_lbfgs_and_no_optimizer_at_all(ranks2: Ranks, row: str, kind: str) -> None:
    expected = fit_with_optimizer("auto", kind)
    for result in ranks2.run(fit_with_optimizer, row, kind):
        # The line of LBFGS divides by small differences of gradients: what rounding leaves in them grows.
        assert_close(result, expected, tolerance=1e-9)


def test_lbfgs_is_refused_where_optimizer_state_rests_sharded(ranks2: Ranks) -> None:
    for error in ranks2.run_expecting_error(fit_with_optimizer, "zero1", "lbfgs"):
        assert error is not None
        assert error[0] == "ValueError"
        assert "accel_ddp" in error[1]


def scheduler_warnings(row: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(row, devices=dist.get_world_size()).fit(Regression(), loader(size=24))
    return [str(warning.message) for warning in caught if "lr_scheduler" in str(warning.message)]


@pytest.mark.parametrize("row", everyday(ROWS))
def test_learning_rate_schedulers_do_not_complain(ranks3: Ranks, row: str) -> None:
    # "Detected call of `lr_scheduler.step()` before `optimizer.step()`": they look at the method that is replaced.
    assert ranks3.run(scheduler_warnings, row) == [[], [], []]


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
    assert_close(values(module), torch.load(folder / "on_exception.ckpt", weights_only=True)["state_dict"], 0)
    return fit(row)


@pytest.mark.parametrize("row", REPLICATED)
def test_fit_after_one_that_failed_on_all_ranks(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    for result in ranks2.run(fail_and_fit_again, row, tmp_path):
        assert_close(result, fit("auto"))
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert len(saved["optimizer_states"][0]["state"]) == 10  # of all parameters


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


# ---------------------------------------------------------------------- checkpoints


def stop_after(epochs: int, strategy: str, path: Path) -> None:
    make(strategy, max_epochs=epochs, callbacks=[SaveAtEnd(path)]).fit(Regression(), loader())


class SaveAtEnd(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def on(strategy: str, ranks: Ranks, function: Callable[..., Any], *arguments: Any, **more: Any) -> list[Any]:
    """Call in pytest's process for "auto", on all ranks for a row."""
    if strategy == "auto":
        return [function(*arguments, **more)]
    return ranks.run(function, *arguments, **more)


@pytest.mark.parametrize(("before", "after"), CONTINUATIONS)
def test_fit_continues_from_a_checkpoint_of_any_strategy(
    ranks2: Ranks, before: str, after: str, tmp_path: Path
) -> None:
    path = tmp_path / "stopped.ckpt"
    on(before, ranks2, stop_after, 2, before, path)
    for result in on(after, ranks2, fit, after, ckpt_path=path, max_epochs=4):
        assert_close(result, fit("auto", max_epochs=4))


@pytest.mark.parametrize("row", everyday(ROWS))
def test_stop_and_resume_is_exactly_an_uninterrupted_run(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    ranks2.run(stop_after, 2, row, path)
    resumed = ranks2.run(fit, row, ckpt_path=path, max_epochs=4)
    for result, uninterrupted in zip(resumed, ranks2.run(fit, row, max_epochs=4), strict=True):
        # No tolerance: the same numbers are added in the same order.
        assert_close(result, uninterrupted, tolerance=0)


def resume_on_three(path: Path) -> dict[str, Tensor]:
    module = Regression()
    trainer("accel_zero2", devices=3, max_epochs=2).fit(module, loader(), ckpt_path=path)
    return values(module)


def test_fit_continues_on_another_number_of_ranks(ranks2: Ranks, ranks3: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    ranks2.run(stop_after, 2, "zero2", path)
    expected = fit("auto", max_epochs=2)
    for result in ranks3.run(resume_on_three, path):  # nothing is left to train: what is there is what was loaded
        assert_close(result, expected)


@pytest.mark.parametrize("row", everyday(ROWS))
def test_checkpoint_is_the_one_that_a_single_process_writes(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    stop_after(2, "auto", tmp_path / "alone.ckpt")
    ranks2.run(stop_after, 2, row, tmp_path / "ranks.ckpt")
    expected = torch.load(tmp_path / "alone.ckpt", weights_only=True)
    actual = torch.load(tmp_path / "ranks.ckpt", weights_only=True)
    assert actual.keys() == expected.keys()
    assert_close(actual["state_dict"], expected["state_dict"])
    assert actual["lr_schedulers"] == expected["lr_schedulers"]
    assert actual["loops"] == expected["loops"]
    (optimizer,), (expected_optimizer,) = actual["optimizer_states"], expected["optimizer_states"]
    assert optimizer["param_groups"] == expected_optimizer["param_groups"]
    assert optimizer["state"].keys() == expected_optimizer["state"].keys()
    for index, state in expected_optimizer["state"].items():
        assert_close(optimizer["state"][index], state)
    # Views of flat buffers must not drag whole buffers into the file: zip entries are aligned to 64 bytes, no more.
    sizes = [os.path.getsize(tmp_path / name) for name in ("ranks.ckpt", "alone.ckpt")]
    assert abs(sizes[0] - sizes[1]) < 64 * len(optimizer["state"]) * 4


@pytest.mark.parametrize("row", everyday(ROWS))
def test_checkpoint_loads_with_load_from_checkpoint(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    ranks2.run(stop_after, 2, row, path)
    assert_close(values(Regression.load_from_checkpoint(path)), fit("auto", max_epochs=2))


def save_after_fit(row: str, folder: Path) -> None:
    module = Regression()
    trainer = make(row, callbacks=[SaveAtEnd(folder / "within.ckpt")])
    trainer.fit(module, loader())
    trainer.save_checkpoint(folder / "after.ckpt")
    trainer.validate(module, loader(), verbose=False)
    trainer.save_checkpoint(folder / "after validation.ckpt")


@pytest.mark.parametrize("row", everyday(ROWS))
def test_saving_after_fit_has_ended(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    ranks2.run(save_after_fit, row, tmp_path)
    within = torch.load(tmp_path / "within.ckpt", weights_only=True)
    for name in ("after.ckpt", "after validation.ckpt"):
        after = torch.load(tmp_path / name, weights_only=True)
        assert_close(after["state_dict"], within["state_dict"], tolerance=0)
        for index, state in within["optimizer_states"][0]["state"].items():
            assert_close(after["optimizer_states"][0]["state"][index], state, tolerance=0)


# ---------------------------------------------------------------------- manual optimization


class GAN(pl.LightningModule):
    """Two optimizers, each of which trains while the other's parameters are frozen."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.generator = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, OUTPUTS))
            self.critic = nn.Sequential(nn.Linear(OUTPUTS, 7), nn.Tanh(), nn.Linear(7, 1))
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        _, noise, real = batch
        generator, critic = self.optimizers()
        boundary = (batch_idx + 1) % self.accumulate == 0
        with generator.toggle_model(sync_grad=boundary):
            fake = self.generator(noise)
            self.manual_backward(nn.functional.softplus(-self.critic(fake)).mean())
            if boundary:
                self.clip_gradients(generator, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
                generator.step()
                generator.zero_grad()
        self.toggle_optimizer(critic)  # this one reduces in every backward
        loss = nn.functional.softplus(-self.critic(real)) + nn.functional.softplus(self.critic(fake.detach()))
        self.manual_backward(loss.mean())
        if boundary:
            critic.step()
            critic.zero_grad()
        self.untoggle_optimizer(critic)

    def configure_optimizers(self) -> Any:
        generator = torch.optim.Adam(self.generator.parameters(), lr=0.03)
        critic = torch.optim.SGD(self.critic.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        return [generator, critic], []


def fit_gan(strategy: str, accumulate: int) -> dict[str, Tensor]:
    module = GAN(accumulate)
    make(strategy, max_epochs=3).fit(module, loader())
    return values(module)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_manual_optimization_with_two_optimizers(ranks2: Ranks, row: str, accumulate: int) -> None:
    expected = fit_gan("auto", accumulate)
    for result in ranks2.run(fit_gan, row, accumulate):
        assert_close(result, expected)


# ---------------------------------------------------------------------- metrics and communication


class Gathering(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rank = torch.tensor(float(self.global_rank))
        self.gathered = self.all_gather({"rank": rank, "pair": torch.stack([rank, rank + 10])})
        # A loss over all ranks' outputs, with gradients through the gathering.
        outputs = self.all_gather(self(batch[1]), sync_grads=True)
        return (outputs**2).mean()


def fit_gathering(strategy: str) -> tuple[Any, dict[str, Tensor]]:
    module = Gathering()
    make(strategy).fit(module, loader())
    return module.gathered, values(module)


@pytest.mark.parametrize("row", everyday(ROWS))
def test_all_gather(ranks2: Ranks, row: str) -> None:
    _, expected = fit_gathering("auto")
    for gathered, parameters in ranks2.run(fit_gathering, row):
        assert gathered["rank"].tolist() == [0.0, 1.0]
        assert gathered["pair"].tolist() == [[0.0, 10.0], [1.0, 11.0]]
        assert_close(parameters, expected)


class Measured(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.train_error = MeanSquaredError().set_dtype(torch.float64)
        self.error = MeanSquaredError().set_dtype(torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.train_error(self(batch[1]), batch[2])
        self.log("train_error", self.train_error, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.error(self(batch[1]), batch[2])
        self.log("error", self.error)


def fit_measured(strategy: str) -> dict[str, float]:
    trainer = make(strategy, max_epochs=2)
    trainer.fit(Measured(), loader(), loader(size=16))
    return {name: trainer.callback_metrics[name].item() for name in ("train_error", "error")}


@pytest.mark.parametrize("row", everyday(ROWS))
def test_torchmetrics_are_those_of_a_single_process(ranks2: Ranks, row: str) -> None:
    expected = fit_measured("auto")
    assert ranks2.run(fit_measured, row) == [pytest.approx(expected, rel=FLOAT64)] * 2


# ---------------------------------------------------------------------- batch norm and tuning


class Normalised(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net.blocks.insert(1, nn.BatchNorm1d(5, dtype=torch.float64))


def buffers_after_fit(strategy: str, accumulate: int) -> dict[str, Tensor]:
    module = Normalised()
    trainer(strategy, max_epochs=2, accumulate_grad_batches=accumulate).fit(module, loader(), loader(size=16))
    return dict(module.named_buffers()) | values(module)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_batch_norm_statistics_are_those_of_rank_0_under_torch_ddp(ranks2: Ranks, row: str, accumulate: int) -> None:
    expected = ranks2.run(buffers_after_fit, "ddp", accumulate)[0]
    assert expected["net.blocks.1.num_batches_tracked"] == 8
    for result in ranks2.run(buffers_after_fit, f"accel_{row}", accumulate):
        assert result.pop("net.blocks.1.num_batches_tracked") == 8
        assert_close(result, {name: expected[name] for name in result})


class Kinds(pl.Callback):
    """Notes what the batch norm is while training begins, and stops before its forward, which the CPU does not have."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.during = type(pl_module.net.blocks[1]).__name__
        trainer.should_stop = True


def convert_batch_norm(row: str) -> tuple[str, str, bool]:
    module = Normalised()
    before = module.net.blocks[1]
    kinds = Kinds()
    make(row, sync_batchnorm=True, callbacks=[kinds]).fit(module, loader())
    after = module.net.blocks[1]
    same = torch.equal(before.weight, after.weight) and after.weight is module.get_parameter("net.blocks.1.weight")
    return kinds.during, type(after).__name__, same


@pytest.mark.parametrize("row", everyday(ROWS))
def test_sync_batchnorm_converts_for_fit_and_reverts_after(ranks2: Ranks, row: str) -> None:
    for during, after, same in ranks2.run(convert_batch_norm, row):
        assert during == "SyncBatchNorm"
        assert after == "_BatchNormXd"  # Lightning's stand-in for the BatchNorm1d whose class it does not remember
        assert same


def train_with_sync_batchnorm() -> None:
    make("zero2", sync_batchnorm=True).fit(Normalised(), loader())


def test_sync_batchnorm_on_the_cpu_says_that_torch_has_none(ranks2: Ranks) -> None:
    for error in ranks2.run_expecting_error(train_with_sync_batchnorm):
        assert error is not None
        assert "SyncBatchNorm expected input tensor to be on GPU" in error[1]


class Thaw(BaseFinetuning):
    """Trains the last layer alone at first, then the blocks as well, then everything."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze([pl_module.net.first, pl_module.net.blocks])

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        for begin, module in {1: pl_module.net.blocks, 2: pl_module.net.first}.items():
            if epoch >= begin:  # again after a resume; what is in the optimizer already is not added twice
                self.unfreeze_and_add_param_group(module, optimizer, initial_denom_lr=3.0)


class Tuned(Regression):
    def configure_optimizers(self) -> Any:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=0.03)


def finetune(strategy: str, epochs: int = 4, ckpt_path: Any = None, save: Any = None) -> dict[str, Tensor]:
    module = Tuned()
    callbacks = [Thaw(), *([SaveAtEnd(save)] if save else [])]
    arguments = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    make(strategy, max_epochs=epochs, callbacks=callbacks, **arguments).fit(module, loader(), ckpt_path=ckpt_path)
    return values(module)


@pytest.mark.parametrize("row", everyday(ROWS))
def test_finetuning_that_adds_parameter_groups_later(ranks2: Ranks, row: str) -> None:
    expected = finetune("auto")
    for result in ranks2.run(finetune, row):
        assert_close(result, expected)


@pytest.mark.parametrize(("before", "after"), CONTINUATIONS)
def test_finetuning_resumes_after_groups_were_added(ranks2: Ranks, before: str, after: str, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    on(before, ranks2, finetune, before, 2, save=path)
    for result in on(after, ranks2, finetune, after, ckpt_path=path):
        assert_close(result, finetune("auto"))


# ---------------------------------------------------------------------- CLI


def run_cli(options: list[str]) -> tuple[Any, dict[str, Tensor]]:
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    arguments = ["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.devices=2", *quiet, *options]
    cli = LightningCLI(Regression, Data, args=arguments, save_config_callback=None)
    strategy = cli.trainer.strategy
    return (strategy.row.name, strategy._options.bucket_cap_mb, strategy._options.units), values(cli.model)


CLASS = f"{AccelZeROStrategy.__module__}.{AccelZeROStrategy.__qualname__}"


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
