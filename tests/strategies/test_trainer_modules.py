"""LightningModules that do more than a loss, under each row: their numbers are those of a single process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler, LearningRateFinder
from models import (
    CONTINUATIONS,
    FEATURES,
    FLOAT64,
    OUTPUTS,
    REPLICATED,
    ROWS,
    ArriveLate,
    Regression,
    SaveAtEnd,
    assert_close,
    loader,
    make,
    on,
    trainer,
    values,
)
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from harness import Ranks
from rows import everyday


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
        for found in ranks2.run_expecting_error(fit_module, row, kind, tmp_path / "ranks"):
            assert found is not None
            assert re.search(r"net\.first\.weight.*rest sharded.*full_parameters", found[1])
        return
    expected = fit_module("auto", kind, tmp_path / "alone")
    for result in ranks2.run(fit_module, row, kind, tmp_path / "ranks"):
        assert_close(result, expected)


# ---------------------------------------------------------------------- optimizers


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


# ---------------------------------------------------------------------- batch norm


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


# ---------------------------------------------------------------------- fine-tuning


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
