"""Fits under accel_xla that go on from a checkpoint of the middle of an epoch are those that were not interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from litnet import FLOAT32, LitNet, Losses, loader, trainer, values
from torch import Tensor
from torchmetrics import MeanMetric

pytestmark = pytest.mark.xla

BATCHES = 5


class Noting(LitNet):
    """Notes the samples of each batch."""

    def __init__(self) -> None:
        super().__init__(schedule=True)
        self.seen: list[Any] = []
        self.mean = MeanMetric()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            self.seen.append(batch[0].tolist())
        return batch

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss


class SaveOnce(pl.Callback):
    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.left = path, batches

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


def run(seed: int, *, save: SaveOnce | None = None, resume: Path | None = None, **settings: Any) -> Any:
    pl.seed_everything(seed, verbose=False)
    model, losses = Noting(), Losses()
    callbacks = [losses, *([] if save is None else [save])]
    fit = trainer("accel_xla", max_epochs=3, callbacks=callbacks, gradient_clip_val=0.3, **settings)
    fit.fit(model, loader(BATCHES, shuffle=True), loader(1, seed=2), ckpt_path=resume)
    logged = {name: float(value) for name, value in fit.callback_metrics.items()}
    return model, losses.values, logged, fit.global_step


@pytest.mark.parametrize(
    ("batches", "repeated", "settings"),
    [
        pytest.param(BATCHES + 2, 0, {}, id="within an epoch"),
        pytest.param(BATCHES + 4, 1, {"accumulate_grad_batches": 3}, id="while gradients accumulate"),
    ],
)
def test_a_fit_goes_on_at_the_right_sample(
    batches: int, repeated: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "middle.ckpt"
    whole, losses, logged, steps = run(0, save=SaveOnce(path, batches), **settings)
    resumed, rest, logged_then, steps_then = run(5, resume=path, **settings)
    left = 3 * BATCHES - batches + repeated
    assert resumed.seen == whole.seen[-left:]
    assert len({str(batch) for batch in whole.seen[BATCHES : 2 * BATCHES]}) == BATCHES
    assert rest == pytest.approx(losses[-left:], rel=FLOAT32)
    assert float((values(resumed) - values(whole)).norm() / values(whole).norm()) < FLOAT32
    assert logged_then == pytest.approx(logged, rel=FLOAT32)
    assert steps_then == steps


def test_what_was_logged_in_the_epoch_counts(tmp_path: Path) -> None:
    class Epochs(pl.Callback):
        found: list[float]

        def on_train_start(self, *args: Any) -> None:
            self.found = []

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.found.append(float(trainer.callback_metrics["mean"]))

    path, ours, theirs = tmp_path / "middle.ckpt", Epochs(), Epochs()
    pl.seed_everything(0, verbose=False)
    fit = trainer("accel_xla", max_epochs=2, callbacks=[ours, SaveOnce(path, BATCHES + 2)])
    fit.fit(Noting(), loader(BATCHES))
    torch.manual_seed(5)
    trainer("accel_xla", max_epochs=2, callbacks=[theirs]).fit(Noting(), loader(BATCHES), ckpt_path=path)
    assert theirs.found == pytest.approx(ours.found[-1:], rel=FLOAT32)
