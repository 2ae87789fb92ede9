"""Hybrid shard in the Trainer: two copies of the state on four ranks. (Fabric and more settings: test_fsdp.py.)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from models import FLOAT64, Regression, alone, assert_close, loader, trainer, values
from torch import Tensor

from harness import Ranks
from lightning_accel.strategies import AccelFSDPStrategy
from opened import opened


@pytest.fixture(scope="module")
def ranks4(ranks_of: Callable[[int], Ranks]) -> Ranks:
    return ranks_of(4)


def make(**arguments: Any) -> pl.Trainer:
    """Stock Lightning in pytest's process, hybrid shard in ranks."""
    if not dist.is_initialized():
        return alone(**arguments)
    return trainer(AccelFSDPStrategy(sharding="hybrid", shard_size=2), devices=4, **arguments)


def stages(folder: Path, **arguments: Any) -> dict[str, Any]:
    """Fit with validation and checkpoints until it is stopped early; then every other stage."""
    module = Regression(lr=0.2)  # too much: the validation loss rises soon
    best = ModelCheckpoint(folder, filename="{epoch}", monitor="val_loss", save_top_k=2)
    callbacks = [best, EarlyStopping("val_loss", patience=2)]
    used = make(callbacks=callbacks, enable_checkpointing=True, gradient_clip_val=0.3, **arguments)
    used.fit(module, loader(), loader(size=16))
    trained = values(module)
    losses = {
        **used.validate(module, loader(), verbose=False)[0],
        **used.test(module, loader(), ckpt_path="best", verbose=False)[0],
    }
    predicted = torch.stack(used.predict(module, loader()))
    again = make(max_epochs=used.current_epoch + 2, gradient_clip_val=0.3)
    again.fit(resumed := Regression(lr=0.2), loader(), ckpt_path=best.best_model_path)
    kept = sorted(path.name for path in folder.iterdir())
    epochs = used.current_epoch
    return {
        "values": trained,
        "losses": losses,
        "predicted": predicted,
        "resumed": values(resumed),
        "kept": kept,
        "best": Path(best.best_model_path).name,
        "epochs": epochs,
    }


def require_same(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for rank, result in enumerate(results):
        for key in ("values", "resumed"):
            assert_close(result[key], expected[key])
            assert_close(result[key], results[0][key], tolerance=0)  # copies do not drift apart
        for key in ("kept", "best", "epochs"):
            assert result[key] == expected[key], key
        assert result["losses"] == pytest.approx(expected["losses"], rel=FLOAT64)
        mine = expected["predicted"][:, rank :: len(results)]
        torch.testing.assert_close(result["predicted"], mine, rtol=FLOAT64, atol=FLOAT64)


def test_every_stage_equals_a_single_process(ranks4: Ranks, tmp_path: Path) -> None:
    expected = stages(tmp_path / "alone", max_epochs=3)
    require_same(ranks4.run(stages, tmp_path / "ranks", max_epochs=3), expected)


@pytest.mark.matrix
@pytest.mark.parametrize("accumulate", [1, 3])
def test_early_stopping_and_accumulation(ranks4: Ranks, accumulate: int, tmp_path: Path) -> None:
    arguments = {"max_epochs": 30, "accumulate_grad_batches": accumulate}
    expected = stages(tmp_path / "alone", **arguments)
    assert 3 < expected["epochs"] < 30, "it must be stopped"
    require_same(ranks4.run(stages, tmp_path / "ranks", **arguments), expected)


def fit_and_save(path: Path, ckpt_path: Path | None = None, **arguments: Any) -> dict[str, Tensor]:
    module = Regression()
    used = make(**arguments)
    used.fit(module, loader(), ckpt_path=ckpt_path)
    used.save_checkpoint(path)
    return values(module)


@pytest.mark.matrix
def test_checkpoint_is_that_of_a_single_process_and_resuming_is_exact(ranks4: Ranks, tmp_path: Path) -> None:
    fit_and_save(tmp_path / "alone.ckpt", max_epochs=2)
    ranks4.run(fit_and_save, tmp_path / "ranks.ckpt", max_epochs=2)
    expected, actual = (opened(tmp_path / f"{name}.ckpt") for name in ("alone", "ranks"))
    assert actual.keys() == expected.keys() | {"lightning_accel"}
    assert_close(actual["state_dict"], expected["state_dict"])
    (ours,), (theirs,) = actual["optimizer_states"], expected["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert_close(ours["state"][index], state)
    assert_close(values(Regression.load_from_checkpoint(tmp_path / "ranks.ckpt")), expected["state_dict"])

    whole = ranks4.run(fit_and_save, tmp_path / "whole.ckpt", max_epochs=4)
    resumed = ranks4.run(fit_and_save, tmp_path / "resumed.ckpt", tmp_path / "ranks.ckpt", max_epochs=4)
    for one, other in zip(resumed, whole, strict=True):
        assert_close(one, other, tolerance=0)
