"""A Trainer's fit under accel_xla on four virtual CPU devices, beside the Trainer's on the CPU."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from litnet import FLOAT32, SAMPLES, LitNet, Losses, difference, leave_group, litnet, loader, trainer, values
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel.core.placement import ROWS
from lightning_accel.core.xla.report import XLAReport
from lightning_accel.strategies import AccelXLAStrategy

pytestmark = pytest.mark.xla

DISTINCT = ["ddp", "zero1", "zero2", "fsdp", "fsdp_hybrid"]
"""``zero3`` and ``fsdp_partial`` are ``fsdp`` here."""


def strategy(row: str) -> AccelXLAStrategy:
    return AccelXLAStrategy(row, shard_size=2 if ROWS[row].hybrid else None)


class Reported(pl.Callback):
    report: XLAReport

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.report = trainer.strategy.engine.report()


def both(row: str, data: Any, module: dict[str, Any] | None = None, **settings: Any) -> tuple[LitNet, LitNet]:
    """The same fit under accel_xla and on the CPU; losses are compared here."""
    found = []
    for chosen in (strategy(row), "auto"):
        losses = Losses()
        model = litnet(**(module or {}))
        pl.seed_everything(3, verbose=False)
        trainer(chosen, callbacks=[losses], **settings).fit(model, data)
        found.append((model, losses.values))
    (ours, our_losses), (theirs, their_losses) = found
    assert len(our_losses) == len(their_losses) > 1
    precise = settings.get("precision", "32-true") == "32-true"
    assert our_losses == pytest.approx(their_losses, rel=FLOAT32 if precise else 2**-6)
    return ours, theirs


@pytest.mark.parametrize("row", ROWS)
def test_equals_the_cpu_with_accumulation_and_clipping(row: str) -> None:
    settings = {"max_steps": 20, "accumulate_grad_batches": 2, "gradient_clip_val": 0.3}
    ours, theirs = both(row, loader(20, shuffle=True), **settings)  # batches in the order of the CPU's random numbers
    assert difference(ours, theirs) < FLOAT32
    assert difference(theirs, litnet()) > 1000 * FLOAT32, "it learns"


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ("fsdp", {}),
        ("zero2", {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    ],
)
def test_equals_the_cpu(row: str, settings: dict[str, Any]) -> None:
    ours, theirs = both(row, loader(10), {"schedule": True}, max_steps=20, **settings)
    assert difference(ours, theirs) < FLOAT32


@pytest.mark.parametrize("row", ["ddp", "fsdp"])
def test_manual_optimization_equals_the_cpu(row: str) -> None:
    ours, theirs = both(row, loader(10), {"manual": True}, max_epochs=4)
    assert difference(ours, theirs) < FLOAT32


@pytest.mark.parametrize("row", ["ddp", "fsdp"])
def test_bf16_mixed_is_within_its_rounding(row: str) -> None:
    ours, _ = both(row, loader(10), max_steps=20, precision="bf16-mixed", gradient_clip_val=0.3)
    assert ours.scale.dtype is torch.float32


def test_bf16_true() -> None:
    ours, _ = both("fsdp", loader(5), max_steps=5, precision="bf16-true")
    assert ours.head.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("row", ["zero2", "fsdp"])
def test_activation_checkpointing_equals_the_cpu(row: str) -> None:
    ours, theirs = litnet(), litnet()
    calls = []
    ours.blocks[0].up.register_forward_hook(lambda *_: calls.append(1))
    chosen = AccelXLAStrategy(row, activation_checkpointing=True)
    settings: dict[str, Any] = {"max_steps": 5, "accumulate_grad_batches": 2, "gradient_clip_val": 0.3}
    trainer(chosen, **settings).fit(ours, loader(10), loader(2, seed=2))
    trainer(**settings).fit(theirs, loader(10))
    assert difference(ours, theirs) < FLOAT32
    assert len(calls) == 2 * 10 + 2 + 2, "twice for each batch, once in validation"


def test_the_last_step_of_an_epoch_counts_the_micro_batches_there_are() -> None:
    """Three batches, two at a time: as the package's other strategies, and unlike Lightning's own."""
    ours, theirs = litnet(), litnet()
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2}
    trainer("accel_xla", **settings).fit(ours, loader(3))
    trainer("accel_ddp", accelerator="cpu", devices=1, use_distributed_sampler=False, **settings).fit(theirs, loader(3))
    leave_group()
    assert difference(ours, theirs) < FLOAT32


@pytest.mark.parametrize("row", DISTINCT)
def test_optimizer_state_rests_as_the_row_says(row: str) -> None:
    reported = Reported()
    model = litnet()
    fit = trainer(strategy(row), max_steps=3, callbacks=[reported])
    fit.fit(model, loader(3))
    trained = [p for p in model.parameters() if p in fit.optimizers[0].state]
    whole = 2 * sum(4 * p.numel() for p in trained)
    assert reported.report.steps == 3
    parts = {"ddp": 1, "fsdp_hybrid": 2}.get(row, 4)
    # Uneven sizes are padded; all devices together have at least all of it.
    assert whole <= parts * reported.report.at_rest["optimizer_state"] < 1.15 * whole


def test_after_fit_all_is_at_home_and_can_be_used() -> None:
    model = litnet()
    fit = trainer("accel_xla", max_steps=2)
    fit.fit(model, loader(2))
    assert model.device == torch.device("cpu")
    assert model.head.weight is model.embed.weight
    assert model(torch.zeros(2, 5, dtype=torch.int64)).device.type == "cpu"
    (optimizer,) = fit.optimizers
    assert set(optimizer.state) <= set(model.parameters())
    assert {v.device.type for state in optimizer.state.values() for v in state.values()} == {"cpu"}
    before = values(model)
    model.loss(next(iter(loader(1))))[0].backward()
    optimizer.step()
    assert not torch.equal(before, values(model))


def test_auto_goes_with_the_other() -> None:
    for settings in ({"strategy": "accel_xla"}, {"accelerator": "accel_xla"}, {"strategy": AccelXLAStrategy("ddp")}):
        made = pl.Trainer(**settings, logger=False, enable_checkpointing=False)
        assert isinstance(made.strategy, AccelXLAStrategy)
        assert made.accelerator.name() == "accel_xla"
        assert made.num_devices == 4
        assert made.world_size == 1
    assert pl.Trainer(strategy="accel_xla", accelerator="accel_xla", devices=4, logger=False).num_devices == 4


class Evaluated(LitNet):
    def configure_callbacks(self) -> list[pl.Callback]:
        return [EarlyStopping("val_loss", patience=1, mode="max")]


def test_evaluation_callbacks_and_metrics_equal_the_cpu(tmp_path: Path) -> None:
    found = []
    for name, chosen in (("xla", "accel_xla"), ("cpu", "auto")):
        torch.manual_seed(0)
        model = Evaluated(schedule=True)
        best = ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)
        logger = CSVLogger(tmp_path / name)
        callbacks = [best, LearningRateMonitor(), *([DeviceStatsMonitor()] if name == "xla" else [])]
        fit = trainer(chosen, tmp_path / name, max_epochs=6, callbacks=callbacks, logger=logger, log_every_n_steps=2)
        fit.fit(model, loader(4), loader(2, seed=2))
        epochs = fit.current_epoch
        metrics = dict(fit.callback_metrics)
        tested = fit.test(model, loader(2, seed=3), ckpt_path="best", verbose=False)[0]
        validated = fit.validate(model, loader(2, seed=3), verbose=False)[0]
        predicted = torch.cat(fit.predict(model, loader(2, seed=3)))
        assert predicted.device.type == "cpu"
        assert Path(best.best_model_path).is_file()
        scores = sorted(float(score) for score in best.best_k_models.values())
        numbers = {k: float(v) for k, v in metrics.items() if not k.startswith("DeviceStats")}
        found.append((epochs, {**numbers, **tested, **validated}, scores, predicted))
    ours, theirs = found
    assert ours[0] == theirs[0]
    assert ours[1] == pytest.approx(theirs[1], rel=FLOAT32)
    assert {"val_accuracy", "val_loss", "test_loss", "train_loss_epoch"} <= set(ours[1])
    assert ours[2] == pytest.approx(theirs[2], rel=FLOAT32)
    assert torch.allclose(ours[3], theirs[3], rtol=1e-4, atol=1e-5)


def test_nothing_is_compiled_or_read_once_it_is_warm() -> None:
    class Counted(pl.Callback):
        def __init__(self) -> None:
            self.compiled: list[int] = []
            self.read: list[int] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            from torch_xla.debug import metrics

            self.compiled.append(trainer.strategy.engine.compilations)
            self.read.append((metrics.metric_data("TransferFromDeviceTime") or (0,))[0])

    counted = Counted()
    fit = trainer("accel_xla", max_epochs=3, callbacks=[counted], gradient_clip_val=0.3, check_val_every_n_epoch=1)
    fit.fit(litnet(schedule=True), loader(6), loader(2, seed=2))
    assert len(counted.compiled) == 18
    assert len(set(counted.compiled[8:])) == 1, counted.compiled
    assert len(set(counted.read[1:6])) == 1, counted.read  # within an epoch nothing waits for a value


def test_dropout_follows_the_seed() -> None:
    found = []
    for seed in (5, 5, 6):
        model = litnet(dropout=0.5)
        pl.seed_everything(seed, verbose=False)
        trainer("accel_xla", max_steps=3).fit(model, loader(3))
        found.append(values(model))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


class Batched(LitNet):
    """Takes dictionaries, and looks at what comes to the hook."""

    seen: dict[str, Any]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen = dict(batch)
        return batch["tokens"], batch["targets"]


class Words(UserDict):
    """As a tokenizer's."""

    def to(self, device: Any) -> Words:
        raise AssertionError("its tensors would be whole on each device")


@pytest.mark.parametrize("kind", [dict, Words])
def test_batches_of_other_kinds(kind: type) -> None:
    batch = kind(
        tokens=torch.ones(8, 5, dtype=torch.int64), targets=torch.zeros(8, dtype=torch.int64), name="a", rate=0.5
    )
    torch.manual_seed(0)
    model = Batched()
    trainer("accel_xla", max_steps=1).fit(model, DataLoader([batch], batch_size=None, collate_fn=lambda same: same))
    assert model.seen["tokens"].device.type == "xla"
    assert model.seen["name"] == "a"
    assert model.seen["rate"] == 0.5


class Moved(LitNet):
    """Moves its batches itself."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return [part.to(device) for part in batch]


def test_a_transfer_of_ones_own() -> None:
    torch.manual_seed(0)
    ours, theirs = Moved(), litnet()
    trainer("accel_xla", max_steps=3).fit(ours, loader(3))
    trainer(max_steps=3).fit(theirs, loader(3))
    assert difference(ours, theirs) < FLOAT32


class Late(LitNet):
    """Makes its head when the strategy is there."""

    def configure_model(self) -> None:
        self.late = nn.Linear(4, 4)


def test_configure_model_makes_values_in_host_memory() -> None:
    torch.manual_seed(0)
    model = Late()
    torch.manual_seed(1)
    trainer("accel_xla", max_steps=1).fit(model, loader(1))
    torch.manual_seed(1)
    assert torch.equal(model.late.weight, nn.Linear(4, 4).weight)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"multiple of the 4 XLA devices, got a tensor of shape \(6, 5\).*drop_last"):
        trainer("accel_xla", max_steps=9).fit(litnet(), loader(2, size=6))


def test_a_short_last_batch_that_divides() -> None:
    ours, theirs = both("fsdp", loader(3, size=SAMPLES + 4), max_epochs=2)  # 20, 20 and 8
    assert difference(ours, theirs) < FLOAT32


@pytest.mark.parametrize("devices", [3, [0, 1], "2", True])
def test_devices_that_do_not_fit(devices: Any) -> None:
    with pytest.raises(ValueError, match="Expected devices to be 'auto' or 4, got .*CPU_NUM_DEVICES"):
        trainer("accel_xla", devices=devices)


def test_several_nodes() -> None:
    with pytest.raises(ValueError, match="Expected num_nodes=1 with accel_xla.*got 2"):
        trainer("accel_xla", num_nodes=2)


@pytest.mark.parametrize("precision", ["16-true", "64-true"])
def test_other_precisions(precision: Any) -> None:
    with pytest.raises(ValueError, match=f"'bf16-mixed' or 'bf16-true' with accel_xla, got '{precision}'"):
        trainer("accel_xla", precision=precision)


def test_a_model_stays_usable_when_a_unit_does_not_exist() -> None:
    model = litnet()
    with pytest.raises(ValueError, match="nowhere"):
        trainer(AccelXLAStrategy("fsdp", units=["nowhere"]), max_steps=1).fit(model, loader(1))
    assert model.head.weight is model.embed.weight
    assert model.head.weight.device.type == "cpu"


def test_fit_again_goes_on_with_the_values_there_are() -> None:
    ours, theirs = litnet(), litnet()
    for _ in range(2):
        trainer("accel_xla", max_steps=3).fit(ours, loader(3))
        trainer(max_steps=3).fit(theirs, loader(3))
    assert difference(ours, theirs) < FLOAT32


def test_a_step_that_fails_leaves_the_model_at_home() -> None:
    class Failing(LitNet):
        def training_step(self, batch: Any, index: int) -> Tensor:
            if index == 1:
                raise RuntimeError("a step of the user's")
            return super().training_step(batch, index)

    torch.manual_seed(0)
    model = Failing()
    with pytest.raises(RuntimeError, match=r"a step of the user's"):
        trainer("accel_xla", max_steps=3).fit(model, loader(3))
    assert values(model).isfinite().all()
    assert model.head.weight is model.embed.weight
