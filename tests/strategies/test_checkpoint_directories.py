"""Checkpoint directories in Lightning's hands: callbacks, hooks, stages, Fabric, and saving in the background."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Net, Regression, SaveAtEnd, assert_close, fit, loader, make, trainer, values
from torch import Tensor

from harness import Ranks
from lightning_accel.core.checkpoint import Shard, StoredTensor, load
from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.strategies import AccelDDPStrategy, AccelFSDPStrategy, AccelZeROStrategy, fabric
from lightning_accel.strategies.stock import whole
from rows import everyday

SHARDED = everyday(["zero1", "zero2", "fsdp", "fsdp_partial"])


# ---------------------------------------------------------------------- ModelCheckpoint


def keep_best(
    row: str, folder: Path, save_last: Any, weights_only: bool = False
) -> tuple[str, float, dict[str, Tensor]]:
    best = ModelCheckpoint(
        folder,
        filename="{epoch}",
        monitor="epoch",
        mode="max",
        save_top_k=1,
        save_last=save_last,
        save_weights_only=weights_only,
    )
    used = make(row, max_epochs=3, callbacks=[best], enable_checkpointing=True)
    module = Regression()
    used.fit(module, loader())
    trained = values(module)
    (metrics,) = used.test(module, loader(), ckpt_path="best", verbose=False)
    return best.best_model_path, metrics["test_loss"], trained


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("row", SHARDED)
def test_model_checkpoint_keeps_the_best_and_the_last(ranks2: Ranks, row: str, save_last: Any, tmp_path: Path) -> None:
    for path, loss, trained in ranks2.run(keep_best, row, tmp_path, save_last):
        assert path == str(tmp_path / "epoch=2.ckpt")
        assert_close(whole(load(path))["state_dict"], trained, tolerance=0)
        assert_close(whole(load(tmp_path / "last.ckpt"))["state_dict"], trained, tolerance=0)
        alone = Regression.load_from_checkpoint(path)
        (metrics,) = make("auto").test(alone, loader(), verbose=False)
        assert loss == pytest.approx(metrics["test_loss"], rel=1e-6)  # metrics are fp32
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["epoch=2.ckpt", "last.ckpt"]
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")


def test_weights_only_checkpoints_hold_no_optimizer(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(keep_best, "fsdp", tmp_path, None, weights_only=True)
    saved = load(tmp_path / "epoch=2.ckpt")
    assert "optimizer_states" not in saved
    assert all(isinstance(value, StoredTensor) for value in saved["state_dict"].values())


def save_under(strategy: Any, path: Path) -> None:
    trainer(strategy, max_epochs=1, callbacks=[SaveAtEnd(path)]).fit(Regression(), loader())


def choose(kind: str, **options: Any) -> Any:
    return {"ddp": AccelDDPStrategy, "zero2": AccelZeROStrategy, "fsdp": AccelFSDPStrategy}[kind](**options)


def save_as(kind: str, path: Path, **options: Any) -> None:
    save_under(choose(kind, **options), path)


@pytest.mark.parametrize(
    ("kind", "asked", "is_folder"), [("ddp", None, False), ("ddp", "sharded", True), ("fsdp", "full", False)]
)
def test_state_dict_type(ranks2: Ranks, kind: str, asked: Any, is_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    ranks2.run(save_as, kind, path, state_dict_type=asked)
    assert path.is_dir() == is_folder
    if is_folder:  # replicated values are divided among the ranks
        sizes = [path.joinpath(f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
        assert max(sizes) < 2 * min(sizes)
    assert_close(values(Regression.load_from_checkpoint(path)), fit("auto"))


# --------------------------------------------------------------------------------- hooks


class Editing(Regression):
    """Leaves one parameter out, renames another, and adds a tensor and a number of its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        del state["net.last.bias"]
        state["net.renamed"] = state.pop("net.first.bias")
        checkpoint["mine"] = {"number": 7, "tensor": torch.arange(3)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state["net.last.bias"] = torch.full((3,), 2.5, dtype=torch.float64)
        state["net.first.bias"] = state.pop("net.renamed") * 2
        assert checkpoint["mine"]["number"] == 7
        assert torch.equal(checkpoint["mine"]["tensor"], torch.arange(3))


def edit(row: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module = Editing()
    make(row, callbacks=[SaveAtEnd(path)]).fit(module, loader())
    saved = values(module)
    again = Editing(seed=1)
    make(row, max_epochs=1).fit(again, loader(), ckpt_path=path)  # there is nothing left to train
    return saved, values(again)


@pytest.mark.parametrize("row", SHARDED)
def test_edits_of_hooks_take_effect(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    for saved, loaded in ranks2.run(edit, row, tmp_path / "saved.ckpt"):
        expected = dict(saved)
        expected["net.last.bias"] = torch.full((3,), 2.5, dtype=torch.float64)
        expected["net.first.bias"] = saved["net.first.bias"] * 2
        assert_close(loaded, expected, tolerance=0)
    assert "net.last.bias" not in load(tmp_path / "saved.ckpt")["state_dict"]


class Computing(Regression):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mean"] = checkpoint["state_dict"]["net.first.weight"].mean()


def compute(row: str, path: Path) -> str:
    with pytest.raises(RuntimeError, match="each rank has a part.*state_dict_type='full'") as caught:
        make(row, callbacks=[SaveAtEnd(path)]).fit(Computing(), loader())
    return str(caught.value)


def test_values_of_parts_cannot_be_computed_with(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(compute, "fsdp", tmp_path / "saved.ckpt")
    assert not list(tmp_path.iterdir())


class Larger(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net.last = torch.nn.Linear(5, 4, dtype=torch.float64)
        self.extra = torch.nn.Linear(2, 2, dtype=torch.float64)


def load_into_larger(row: str, path: Path) -> bool:
    module = Larger()
    before = values(module)
    with pytest.raises(
        RuntimeError, match="(?s)Missing key.*extra.weight.*size mismatch for net.last.weight"
    ) as caught:
        make(row).fit(module, loader(), ckpt_path=path)
    assert "size mismatch for net.last.bias" in str(caught.value)
    return all(torch.equal(value, before[name]) for name, value in values(module).items())


@pytest.mark.parametrize("row", everyday(["ddp", "zero2"]))
def test_a_checkpoint_that_does_not_fit_changes_nothing(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    ranks2.run(save_as, "zero2", tmp_path / "saved.ckpt")
    assert all(ranks2.run(load_into_larger, row, tmp_path / "saved.ckpt"))


# -------------------------------------------------------------------- in the background


def save_in_background(kind: str, folder: Path) -> dict[str, Tensor]:
    module = Regression()
    keeps = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1)
    strategy = choose(kind, state_dict_type="sharded", async_save=True)
    trainer(strategy, max_epochs=2, callbacks=[keeps], enable_checkpointing=True).fit(module, loader())
    return values(module)


@pytest.mark.parametrize("kind", everyday(["ddp", "zero2", "fsdp"]))
def test_saving_in_the_background(ranks2: Ranks, kind: str, tmp_path: Path) -> None:
    for trained in ranks2.run(save_in_background, kind, tmp_path):
        (left,) = tmp_path.iterdir()
        assert left.name == "step=8.ckpt"
        assert_close(whole(load(left))["state_dict"], trained, tolerance=0)


def fail_in_background(folder: Path) -> tuple[str, int]:
    """The disk is full on rank 1 from the second save on; the first checkpoint must survive."""
    create, saves = Folder.create, []

    @contextmanager
    def full(self: Folder, name: str) -> Any:
        if name.startswith("__1_"):
            saves.append(name)
            if len(saves) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        with create(self, name) as stream:
            yield stream

    keeps = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1)
    used = trainer(AccelFSDPStrategy(async_save=True), max_epochs=9, callbacks=[keeps], enable_checkpointing=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "create", full)
        with pytest.raises(OSError, match="Rank 1 could not write.*step=2.ckpt.*No space left") as caught:
            used.fit(Regression(), loader())
    return str(caught.value), used.global_step


def test_a_failure_in_the_background_is_raised_soon_and_on_all_ranks(ranks2: Ranks, tmp_path: Path) -> None:
    for message, step in ranks2.run(fail_in_background, tmp_path):
        assert "still there" in message
        assert step < 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["step=1.ckpt"]
    assert load(tmp_path / "step=1.ckpt")["global_step"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"async_save": True}, "state_dict_type='sharded' with async_save=True"),
        ({"state_dict_type": "both"}, "'full' or 'sharded', got 'both'"),
        ({"state_dict_type": "sharded", "checkpoint_io": object()}, "no checkpoint_io with state_dict_type='sharded'"),
    ],
)
@pytest.mark.parametrize("kind", [AccelDDPStrategy, fabric.AccelDDPStrategy])
def test_options_that_contradict_each_other(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


# -------------------------------------------------------------------------------- Fabric


def fabric_of(row: str, **options: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=2, strategy=f"accel_{row}", **options)


def fabric_save(row: str, folder: Path) -> dict[str, Tensor]:
    used = fabric_of(row)
    used.launch()
    net = Net()
    model, optimizer = used.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))
    for _, x, y in loader():
        optimizer.zero_grad()
        used.backward(torch.nn.functional.mse_loss(model(x), y))
        optimizer.step()
    used.save(folder / "all", {"model": model, "optimizer": optimizer, "step": 4, "list": [1, torch.ones(2)]})
    used.save(folder / "biases", {"model": model}, filter={"model": lambda name, _: "bias" in name})
    return values(net)


def fabric_load(row: str, folder: Path) -> dict[str, Any]:
    used = fabric_of(row)
    used.launch()
    net = Net(seed=1)
    model, optimizer = used.setup(net, torch.optim.AdamW(net.parameters(), lr=0.5))
    before = values(net)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    rest = used.load(folder / "all", state)
    found = {"values": values(net), "step": state["step"], "rest": rest, "lr": optimizer.param_groups[0]["lr"]}
    raw = Net(seed=2)
    raw_model = used.setup_module(raw)
    used.load_raw(folder / "all", raw_model)
    found["raw"] = values(raw)
    partly = Net(seed=1)
    partly_model = used.setup_module(partly)
    used.load_raw(folder / "biases", partly_model, strict=False)
    found["partly"], found["before"] = values(partly), before
    try:
        used.load(folder / "all", {"model": model, "missing": 1})
    except KeyError as error:
        found["error"] = str(error)
    return found


@pytest.mark.parametrize(("before", "after"), [("fsdp", "zero2"), ("zero2", "ddp"), ("ddp", "fsdp")])
def test_fabric_saves_and_loads(ranks2: Ranks, before: str, after: str, tmp_path: Path) -> None:
    saved = ranks2.run(fabric_save, before, tmp_path)
    for found, expected in zip(ranks2.run(fabric_load, after, tmp_path), saved, strict=True):
        assert_close(found["values"], expected, tolerance=0)
        assert_close(found["raw"], expected, tolerance=0)
        assert (found["step"], found["lr"]) == (4, 0.02)
        assert list(found["rest"]) == ["list"]
        assert torch.equal(found["rest"]["list"][1], torch.ones(2))
        mixed = {name: (expected if "bias" in name else found["before"])[name] for name in expected}
        assert_close(found["partly"], mixed, tolerance=0)
        assert "missing" in found["error"]


def test_parts_say_what_they_are() -> None:
    part = Shard.whole(torch.ones(2, 3))
    assert "shape=(2, 3)" in repr(part)


# ---------------------------------------------------------------------- other stages


def evaluate(row: str, path: Path) -> tuple[float, Tensor]:
    used = make(row)
    (validated,) = used.validate(Regression(seed=1), loader(), ckpt_path=path, verbose=False)
    predicted = used.predict(Regression(seed=2), loader(), ckpt_path=path)
    assert predicted is not None
    return validated["val_loss"], torch.cat(predicted)


@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_evaluation_of_a_directory(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    ranks2.run(save_as, "zero2", path)
    module = Regression.load_from_checkpoint(path)
    (expected,) = make("auto").validate(module, loader(), verbose=False)
    for loss, predicted in ranks2.run(evaluate, row, path):
        assert loss == pytest.approx(expected["val_loss"], rel=1e-6)  # metrics are fp32
        assert len(predicted) == 16


def open_wrong(row: str, folder: Path) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="complete checkpoint, which has the file manifest.json"):
        make(row).fit(Regression(), loader(), ckpt_path=folder / "empty")


def test_a_folder_that_is_no_checkpoint(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(open_wrong, "zero2", tmp_path)


class Both(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(
            [{"params": self.net.first.parameters(), "lr": 0.1}, {"params": self.net.blocks.parameters()}], lr=0.01
        )


def other_groups(row: str, path: Path) -> str:
    with pytest.raises(ValueError, match="parameter groups: expected 2, got 1") as caught:
        make(row, max_epochs=3).fit(Both(), loader(), ckpt_path=path)
    return str(caught.value)


def test_other_groups_are_reported_by_name(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(save_as, "fsdp", tmp_path / "saved.ckpt")
    for message in ranks2.run(other_groups, "zero1", tmp_path / "saved.ckpt"):
        assert "parameter group 0: unexpected: net.blocks.0.linear.bias" in message
        assert "parameter group 1: missing: net.blocks.0.linear.bias" in message


def other_number(row: str, path: Path) -> None:
    class Two(Regression):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net.first.parameters(), 0.1), torch.optim.SGD(self.net.last.parameters(), 0.1)]

    with pytest.raises(ValueError, match="state of 2 optimizers, got that of 1"):
        make(row, max_epochs=3).fit(Two(), loader(), ckpt_path=path)


def test_another_number_of_optimizers(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(save_as, "fsdp", tmp_path / "saved.ckpt")
    ranks2.run(other_number, "fsdp", tmp_path / "saved.ckpt")


def tune(row: str, folder: Path) -> bool:
    used = make(row, default_root_dir=folder)
    module = Regression()
    before = values(module)
    pl.tuner.Tuner(used).lr_find(module, loader(), num_training=4, min_lr=1e-4)
    return all(torch.equal(value, before[name]) for name, value in values(module).items())


@pytest.mark.parametrize("row", everyday(["zero2", "fsdp"]))
def test_the_tuner_restores_what_it_has_saved(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    assert all(ranks2.run(tune, row, tmp_path))
    assert not [entry for entry in tmp_path.iterdir() if "lr_find" in entry.name]


# --------------------------------------------------------------- frozen parameters


class Adapted(Regression):
    """Trains its last layer only."""

    def __init__(self, *, seed: int = 0, trained_only: bool = False) -> None:
        super().__init__(seed=seed)
        self.trained_only = trained_only
        self.net.requires_grad_(False)
        self.net.last.requires_grad_(True)
        self.strict_loading = not trained_only

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trained_only:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.last.parameters(), lr=0.02)


def adapt(row: str, folder: Path, trained_only: bool) -> dict[str, Tensor]:
    module = Adapted(trained_only=trained_only)
    keeps = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    make(row, max_epochs=2, callbacks=[keeps], enable_checkpointing=True).fit(module, loader())
    return values(module)


def go_on(row: str, path: Path) -> dict[str, Tensor]:
    module = Adapted(seed=3, trained_only=True)
    make(row, max_epochs=2).fit(module, loader(), ckpt_path=path)  # there is nothing left to train
    return values(module)


@pytest.mark.parametrize(("before", "after"), [("fsdp", "zero2"), ("zero2", "fsdp")])
def test_checkpoints_of_what_is_trained_only(ranks2: Ranks, before: str, after: str, tmp_path: Path) -> None:
    trained = ranks2.run(adapt, before, tmp_path, True)
    fresh = values(Adapted(seed=3))
    for loaded in ranks2.run(go_on, after, tmp_path / "epoch=1.ckpt"):
        expected = {name: (trained[0] if "last" in name else fresh)[name] for name in fresh}
        assert_close(loaded, expected, tolerance=0)


@pytest.mark.parametrize("row", everyday(["zero2", "fsdp"]))
def test_frozen_parameters_are_written_once(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    trained = ranks2.run(adapt, row, tmp_path, False)[0]
    first, second = tmp_path / "epoch=0.ckpt", tmp_path / "epoch=1.ckpt"
    shared = [path for path in second.iterdir() if path.stat().st_nlink == 2]
    assert [path.name for path in sorted(shared)] == ["__0_1.distcp", "__1_1.distcp"]
    for path in first.iterdir():
        path.unlink()
    assert_close(whole(load(second))["state_dict"], trained, tolerance=0)
