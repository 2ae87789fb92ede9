"""Checkpoints of a Trainer, under each row: a single process's file, and where a run can go on from it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from models import CONTINUATIONS, ROWS, Regression, SaveAtEnd, assert_close, fit, loader, make, on, trainer, values
from torch import Tensor

from harness import Ranks
from opened import full, opened
from rows import everyday


def stop_after(epochs: int, strategy: str, path: Path) -> None:
    make(strategy, max_epochs=epochs, callbacks=[SaveAtEnd(path)]).fit(Regression(), loader())


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


def save_whole(row: str, path: Path) -> None:
    trainer(full(row), max_epochs=2, callbacks=[SaveAtEnd(path)]).fit(Regression(), loader())


@pytest.mark.parametrize("row", everyday(ROWS))
def test_checkpoint_is_the_one_that_a_single_process_writes(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    stop_after(2, "auto", tmp_path / "alone.ckpt")
    ranks2.run(save_whole, row, tmp_path / "ranks.ckpt")
    expected = opened(tmp_path / "alone.ckpt")
    actual = opened(tmp_path / "ranks.ckpt")
    going_on = actual.pop("lightning_accel")  # which stock Lightning does not write
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
    buffer = io.BytesIO()
    torch.save(going_on, buffer)
    assert abs(sizes[0] - len(buffer.getvalue()) - sizes[1]) < 64 * len(optimizer["state"]) * 4


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
    within = opened(tmp_path / "within.ckpt")
    for name in ("after.ckpt", "after validation.ckpt"):
        after = opened(tmp_path / name)
        assert_close(after["state_dict"], within["state_dict"], tolerance=0)
        for index, state in within["optimizer_states"][0]["state"].items():
            assert_close(after["optimizer_states"][0]["state"][index], state, tolerance=0)
