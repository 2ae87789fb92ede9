"""precision="16-mixed" under accel_xla: the scale and the steps that are skipped are those of the ordinary rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from litnet import LitNet, difference, leave_group, litnet, loader, trainer
from torch import Tensor

from lightning_accel.core import GradScaler
from lightning_accel.strategies import AccelDDPStrategy, AccelXLAStrategy

pytestmark = pytest.mark.xla

OVERFLOWS = (1, 5, 6, 7, 13)
STEPS = 16
HALF = 2.0**-9
"""fp16 has 11 bits: products are rounded to 2^-12 of themselves, in another order."""


class Overflowing(LitNet):
    """Some of its losses are infinite; what those before have logged is not. Manually, each batch is a step."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss, logits = self.loss(batch)
        assert logits.dtype is torch.float16
        loss = loss * float("inf") if self.global_step_of_batch(index) in OVERFLOWS else loss
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.3, "norm")
            optimizer.step()
        return loss

    def global_step_of_batch(self, index: int) -> int:
        return self.trainer.current_epoch * int(self.trainer.num_training_batches) + index


class Scales(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, int, bool]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        scaler = trainer.scaler
        self.seen.append((scaler.get_scale(), scaler.skipped_steps, bool(module.scale.isfinite())))


def ran(chosen: Any, manual: bool = False, **settings: Any) -> tuple[LitNet, list[Any]]:
    torch.manual_seed(0)
    model = Overflowing(manual=manual)
    scales = Scales()
    fit = trainer(chosen, callbacks=[scales], precision="16-mixed", max_epochs=2, **settings)
    fit.fit(model, loader(STEPS // 2))
    leave_group()
    return model, scales.seen


RULES: dict[str, dict[str, Any]] = {
    "torch": {"growth_interval": 3, "init_scale": 2.0**10},
    "deepspeed": {"rule": "deepspeed", "growth_interval": 2, "init_scale": 2.0**10},
}


@pytest.mark.parametrize(
    ("row", "rule", "manual"), [("fsdp", "torch", False), ("zero2", "deepspeed", False), ("ddp", "torch", True)]
)
def test_scales_and_skipped_steps_are_those_of_the_ordinary_rows(row: str, rule: str, manual: bool) -> None:
    settings: dict[str, Any] = {} if manual else {"gradient_clip_val": 0.3}
    ours = AccelXLAStrategy(row, grad_scaler=GradScaler(**RULES[rule]))
    theirs = AccelDDPStrategy(grad_scaler=GradScaler(**RULES[rule]))
    model, seen = ran(ours, manual, **settings)
    on_cpu = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False}
    other, expected = ran(theirs, manual, **settings, **on_cpu)
    assert seen == expected
    assert seen[-1][1] == len(OVERFLOWS)
    assert len({scale for scale, _, _ in seen}) > 2, "it grows, and gets smaller"
    assert 0 < difference(model, other) < HALF


def test_a_new_scale_compiles_nothing_and_one_value_is_read_a_step() -> None:
    from torch_xla.debug import metrics

    class Counted(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []
            self.scales: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            read = (metrics.metric_data("TransferFromDeviceTime") or (0,))[0]
            self.seen.append((trainer.strategy.engine.compilations, read))
            self.scales.append(trainer.scaler.get_scale())

    counted = Counted()
    chosen = AccelXLAStrategy(grad_scaler=GradScaler(growth_interval=2, init_scale=4.0))
    fit = trainer(chosen, callbacks=[counted], precision="16-mixed", gradient_clip_val=0.3, max_epochs=1)
    fit.fit(litnet(), loader(10))
    assert len(set(counted.scales)) > 4
    compiled, read = zip(*counted.seen[5:], strict=True)  # three new scales are among them
    assert len(set(compiled)) == 1, compiled
    assert {later - sooner for sooner, later in zip(read, read[1:], strict=False)} == {1}, read


def test_the_scale_is_in_the_checkpoint(tmp_path: Path) -> None:
    chosen = AccelXLAStrategy(grad_scaler=GradScaler(growth_interval=2, init_scale=4.0))
    first = trainer(chosen, precision="16-mixed", max_epochs=1)
    first.fit(litnet(), loader(4))
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = trainer("accel_xla", precision="16-mixed", max_epochs=2)
    again.fit(litnet(), loader(1), ckpt_path=tmp_path / "last.ckpt")
    for fit in (first, again):
        assert isinstance(fit.scaler, GradScaler)
        assert fit.scaler.get_scale() == 16.0
