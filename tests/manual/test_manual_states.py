"""What an Accelerator saves, and how a run goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import GLOBAL_BATCH, ROWS, new_optimizer
from models import FLOAT64, Net, Samples, assert_close, values
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness import Ranks
from lightning_accel import Accelerator
from lightning_accel.strategies.fabric import AccelDDPStrategy, AccelZeROStrategy
from rows import everyday

STOP = 2
"""Batches of each epoch that are done when a run is saved, of four."""


class Counter:
    """What a user registers."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Run:
    """A loop with noise in the model, a shuffled loader and a schedule."""

    def __init__(self, strategy: Any, **arguments: Any) -> None:
        self.accelerator = Accelerator(strategy=strategy, cpu=True, seed=3, **arguments)
        self.net, self.counter = Net(), Counter()
        optimizer = new_optimizer(self.net)
        batch_size = GLOBAL_BATCH // self.accelerator.num_processes
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            self.net,
            optimizer,
            DataLoader(Samples(), batch_size=batch_size, shuffle=True),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        )
        self.accelerator.register_for_checkpointing(self.counter)

    def epoch(self, save_to: str | None = None) -> list[list[int]]:
        """The samples of this rank, batch by batch."""
        seen = []
        for index, x, y in self.loader:
            noise = torch.rand(()) * 0.1
            self.accelerator.backward(nn.functional.mse_loss(self.model(x + noise), y))
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.counter.count += 1
            seen.append(index.tolist())
            if save_to is not None and len(seen) == STOP:
                self.accelerator.save_state(save_to)
        return seen

    def result(self) -> tuple[dict[str, Tensor], float, int]:
        return values(self.net), self.scheduler.get_last_lr()[0], self.counter.count


def run_through(row: str, path: str) -> tuple[list[list[int]], Any]:
    run = Run(row)
    first, second = run.epoch(path), run.epoch()
    return first[STOP:] + second, run.result()


def go_on(row: str, path: str) -> tuple[list[list[int]], Any]:
    run = Run(row)
    torch.manual_seed(99)  # what the checkpoint has counts
    run.accelerator.load_state(path)
    rest, second = run.epoch(), run.epoch()
    return rest + second, run.result()


@pytest.mark.parametrize("row", everyday(ROWS))
def test_a_run_goes_on_bit_for_bit(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    through, gone_on = ranks2.run(run_through, row, path), ranks2.run(go_on, row, path)
    for (expected_samples, expected), (samples, result) in zip(through, gone_on, strict=True):
        assert samples == expected_samples
        assert result[1:] == expected[1:]
        for name, value in expected[0].items():
            assert torch.equal(result[0][name], value), name
    assert Path(path, "manifest.json").is_file()


def save_early(row: str, path: str) -> None:
    run = Run(row)
    run.epoch(path)


def parameters_loaded(row: str, path: str) -> tuple[dict[str, Tensor], int]:
    run = Run(row)
    run.accelerator.load_state(path)
    for batch in run.loader:
        assert len(batch[0])
        break
    return values(run.net), run.counter.count


def whole_of(path: str) -> dict[str, Tensor]:
    from lightning_accel.core.checkpoint import load

    return {name: value.full() for name, value in load(path)["model"].items()}


@pytest.mark.parametrize(("row", "other"), [("zero2", "ddp"), pytest.param("fsdp", "zero1", marks=pytest.mark.matrix)])
def test_another_row_and_number_of_ranks(ranks2: Ranks, ranks3: Ranks, row: str, other: str, tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    ranks2.run(save_early, row, path)
    for result, count in ranks3.run(parameters_loaded, other, path):
        assert_close(result, whole_of(path))
        assert count == STOP


def numbered(folder: str, in_background: bool) -> list[Any]:
    def new_run() -> Run:
        strategy = AccelZeROStrategy(stage=2, async_save=in_background)
        return Run(strategy, project_dir=folder, checkpoints_total_limit=2)

    run = new_run()
    paths = [run.accelerator.save_state() for _ in range(2)]
    run.accelerator.end_training()
    again = new_run()
    again.counter.count = 7
    paths.append(again.accelerator.save_state())
    again.accelerator.end_training()
    last = new_run()
    loaded = last.accelerator.load_state()
    return [Path(path).name for path in [*paths, loaded]] + [last.counter.count]


@pytest.mark.parametrize("in_background", [False, True])
def test_numbered_checkpoints(ranks2: Ranks, in_background: bool, tmp_path: Path) -> None:
    """A run that goes on writes over nothing, and the oldest are removed."""
    expected = ["checkpoint_0", "checkpoint_1", "checkpoint_2", "checkpoint_2", 7]
    assert ranks2.run(numbered, str(tmp_path), in_background) == [expected] * 2
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["checkpoint_1", "checkpoint_2"]


def one_file(path: str) -> int:
    run = Run(AccelDDPStrategy(state_dict_type="full"))
    run.counter.count = 5
    run.accelerator.save_state(path)
    other = Run(AccelDDPStrategy(state_dict_type="full"))
    other.accelerator.load_state(path)
    return other.counter.count


def test_one_file(ranks2: Ranks, tmp_path: Path) -> None:
    assert ranks2.run(one_file, str(tmp_path / "state.ckpt")) == [5, 5]
    assert (tmp_path / "state.ckpt").is_file()


def save_alone(path: str) -> None:
    run = Run("zero2", patience_s=0.3)
    if run.accelerator.is_main_process:
        run.accelerator.save_state(path)


def test_saving_on_one_rank_only(ranks2: Ranks, tmp_path: Path) -> None:
    failed, other = ranks2.run_expecting_error(save_alone, str(tmp_path / "state"))
    assert other is None
    assert failed is not None
    assert failed[0] == "RuntimeError"
    assert "Expected every process to call save_state, but process 0 has waited 0.3 s" in failed[1]
    assert "process 1 did not" in failed[1]


def save_nothing_alone(path: str) -> None:
    accelerator = Accelerator(cpu=True, patience_s=0.3)
    if not accelerator.is_main_process:
        accelerator.save_state(path)


def test_saving_on_one_rank_only_without_a_model(ranks2: Ranks, tmp_path: Path) -> None:
    other, failed = ranks2.run_expecting_error(save_nothing_alone, str(tmp_path / "state"))
    assert other is None
    assert failed is not None
    assert "process 0 did not" in failed[1]


def load_within_a_window(row: str, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two parameters that should be the same: one run has begun a window before it loads."""
    found = []
    x, y = torch.ones(2, 5, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    for begun in (False, True):
        run = Run(row, gradient_accumulation_steps=2)
        if not begun:
            run.accelerator.save_state(path)
        for _ in range(begun):
            with run.accelerator.accumulate(run.model):
                run.accelerator.backward(run.model(x).square().mean())
        run.accelerator.load_state(path)
        for _ in range(2):
            with run.accelerator.accumulate(run.model):
                run.accelerator.backward(nn.functional.mse_loss(run.model(x), y))
                run.optimizer.step()
        found.append(values(run.net))
    return found[0], found[1]


@pytest.mark.parametrize("row", everyday(["ddp", "zero2"]))
def test_loading_within_a_window_begins_anew(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    for expected, result in ranks2.run(load_within_a_window, row, str(tmp_path / "state")):
        for name, value in expected.items():
            assert torch.equal(result[name], value), name


def mismatches(folder: str) -> list[str]:
    run = Run("ddp")
    run.accelerator.save_state(f"{folder}/state")
    run.accelerator.fabric.save(f"{folder}/other", {"model": run.model})
    messages = []
    for prepare_more, path in ((True, "state"), (False, "other"), (False, "nothing")):
        other = Run("ddp")
        if prepare_more:
            other.accelerator.prepare(Net())
        before = values(other.net)
        with torch.no_grad():
            before["first.bias"] += 0
        try:
            other.accelerator.load_state(f"{folder}/{path}")
            messages.append("nothing")
        except (ValueError, OSError) as error:
            messages.append(str(error))
        assert_close(values(other.net), before, 0.0)
    return messages


@pytest.mark.parametrize("world", [1], indirect=True)
def test_a_checkpoint_that_does_not_fit(world: Ranks, tmp_path: Path) -> None:
    (messages,) = world.run(mismatches, str(tmp_path))
    assert "which has 1 models (here 2)" in messages[0]
    assert "Expected a checkpoint that save_state has written" in messages[1]
    assert messages[2] != "nothing"


def save_within_a_window(path: str) -> None:
    run = Run("zero2", gradient_accumulation_steps=2)
    with run.accelerator.accumulate(run.model), pytest.warns(UserWarning, match="is not saved"):
        run.accelerator.save_state(path)


@pytest.mark.parametrize("world", [1], indirect=True)
def test_saving_within_a_window_warns(world: Ranks, tmp_path: Path) -> None:
    world.run(save_within_a_window, str(tmp_path / "state"))


def scale_after(path: str) -> tuple[float, float]:
    run = Run("zero2", mixed_precision="fp16")
    run.accelerator.fabric.strategy.grad_scaler._scale.set(128.0)
    run.accelerator.save_state(path)
    other = Run("zero2", mixed_precision="fp16")
    other.accelerator.load_state(path)
    return FLOAT64, other.accelerator.fabric.strategy.grad_scaler.get_scale()


@pytest.mark.parametrize("world", [1], indirect=True)
def test_the_loss_scale_is_saved(world: Ranks, tmp_path: Path) -> None:
    assert world.run(scale_after, str(tmp_path / "state"))[0][1] == 128.0
