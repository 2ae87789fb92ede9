"""Checkpoints under accel_xla: Lightning's ordinary format, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from litnet import FLOAT32, LitNet, difference, leave_group, litnet, loader, trainer
from torch.utils._pytree import tree_leaves

from lightning_accel.strategies import AccelXLAStrategy

pytestmark = pytest.mark.xla


def run(chosen: Any, folder: Path, epochs: int, resume: Path | None = None, **settings: Any) -> tuple[LitNet, Path]:
    model = litnet(schedule=True)
    kept = ModelCheckpoint(folder, monitor="val_loss", save_top_k=1, save_last=True, enable_version_counter=False)
    fit = trainer(chosen, folder, max_epochs=epochs, callbacks=[kept], gradient_clip_val=0.3, **settings)
    fit.fit(model, loader(5), loader(2, seed=2), ckpt_path=resume)
    leave_group()
    return model, folder / "last.ckpt"


def xla(row: str) -> AccelXLAStrategy:
    return AccelXLAStrategy(row)


@pytest.mark.parametrize("row", ["ddp", "zero2", "fsdp"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(row: str, tmp_path: Path) -> None:
    through, _ = run(xla(row), tmp_path / "through", 3)
    _, last = run(xla(row), tmp_path / "first", 1)
    resumed, _ = run(xla(row), tmp_path / "first", 3, last)
    assert difference(resumed, through) < 1e-6


def test_a_checkpoint_is_in_host_memory_and_whole(tmp_path: Path) -> None:
    model, last = run(xla("fsdp"), tmp_path, 1)
    found = torch.load(last, weights_only=True)
    assert {leaf.device.type for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)} == {"cpu"}
    for name, value in model.state_dict().items():
        assert torch.equal(found["state_dict"][name], value), name
    shapes = [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
    state = found["optimizer_states"][0]["state"]
    assert all(tuple(entry["exp_avg"].shape) == shapes[index] for index, entry in state.items())
    again = litnet()
    again.load_state_dict(found["state_dict"])
    assert difference(again, model) == 0


@pytest.mark.parametrize("others", ["auto", "accel_zero2"])
def test_a_run_goes_on_elsewhere_and_comes_from_there(others: str, tmp_path: Path) -> None:
    """``accel_zero2`` saves a directory, to which it writes by names of parameters."""
    cpu: dict[str, Any] = {}
    if others != "auto":  # whose batches Lightning would shuffle
        cpu = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False}
    through, _ = run("auto", tmp_path / "through", 2)
    _, ours = run(xla("fsdp"), tmp_path / "ours", 1)
    there, _ = run(others, tmp_path / "there", 2, ours, **cpu)
    assert difference(there, through) < FLOAT32
    _, theirs = run(others, tmp_path / "theirs", 1, **cpu)
    assert theirs.is_dir() is (others != "auto")
    here, _ = run(xla("fsdp"), tmp_path / "here", 2, theirs)
    assert difference(here, through) < FLOAT32


def test_loaded_optimizer_state_rests_as_the_row_says(tmp_path: Path) -> None:
    _, last = run(xla("zero2"), tmp_path, 1)
    strategy = xla("zero2")
    sizes = []

    class Resumed(LitNet):
        def on_train_start(self) -> None:
            assert strategy.engine is not None
            sizes.append(strategy.engine.report().at_rest["optimizer_state"])

        def on_train_end(self) -> None:
            assert strategy.engine is not None
            sizes.append(strategy.engine.report().at_rest["optimizer_state"])

    trainer(strategy, max_epochs=2).fit(Resumed(schedule=True), loader(5), ckpt_path=last)
    assert sizes[0] == sizes[1] > 0


def test_a_checkpoint_of_another_number_of_optimizers(tmp_path: Path) -> None:
    _, last = run(xla("zero2"), tmp_path, 1)

    class Two(LitNet):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.head.parameters(), lr=0.1), torch.optim.SGD(self.blocks.parameters(), lr=0.1)]

    with pytest.raises(ValueError, match="the state of 2 optimizers, got that of 1"):
        trainer("accel_xla", max_epochs=2).fit(Two(manual=True), loader(5), ckpt_path=last)


def test_values_that_are_loaded_while_it_trains_rest_as_the_row_says() -> None:
    strategy = xla("fsdp")
    sizes = []
    other = litnet()
    with torch.no_grad():
        other.scale.fill_(7.0)

    class Loading(LitNet):
        def on_train_start(self) -> None:
            assert strategy.engine is not None
            sizes.append(strategy.engine.report().at_rest["parameters"])
            strategy.load_model_state_dict({"state_dict": other.state_dict()})
            sizes.append(strategy.engine.report().at_rest["parameters"])

    model = Loading()
    trainer(strategy, max_steps=1).fit(model, loader(1))
    assert sizes[0] == sizes[1]
    assert model.scale.item() == pytest.approx(7.0, abs=0.01)
