"""precision="16-mixed" on the CPU, in the Trainer and in Fabric, under each row; and who gives which scaler."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import StrategyRegistry
from models import ROWS, Net, Regression, alone, loader, trainer, values
from torch import Tensor, nn

from harness import Ranks
from lightning_accel import engine_of
from lightning_accel.callbacks import LossScaleMonitor
from lightning_accel.core import GradScaler
from lightning_accel.strategies import AccelZeROStrategy
from lightning_accel.strategies import fabric as twins
from opened import opened
from rows import everyday

# fp16 carries 11 bits. Samples go through forward and backward alike on one rank and on two; what differs is where sums
# over samples are rounded to fp16: in one process once, for the whole batch, on two ranks once for each half. So the
# gradients of a step differ by some 2**-11 of themselves, and so do sums of steps. Four of that, for good measure.
HALF = 4 * 2.0**-11
SCALE = 2.0**10  # the usual first scale of 2**16 overflows in the first steps of this model


class Recorded(Regression):
    """In single precision, with plain SGD; keeps what it sees."""

    def __init__(self, bad_rank: int | None = None, fused: bool = False, lr: float = 0.1) -> None:
        super().__init__(lr=lr, optimizer="SGD", fused=fused)
        self.float()
        self.bad_rank = bad_rank
        self.dtypes: set[torch.dtype] = set()
        self.norms: list[float] = []
        self.steps: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.dtypes |= {output.dtype, torch.get_autocast_dtype("cpu")}
        return output

    def on_after_backward(self) -> None:
        if self.bad_rank is not None and self.trainer.global_step == 1 and dist.get_rank() == self.bad_rank:
            engine_of(self).optimizers[0].gradients.tensors()[-1][-1] = math.inf

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, **_: Any) -> None:
        if gradient_clip_val is None:
            return
        engine = getattr(self.trainer.strategy, "engine", None)
        if engine is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        else:
            norm = engine.grad_norm(optimizer)
        self.norms.append(float(norm))
        self.clip_gradients(optimizer, gradient_clip_val, "norm")

    def on_train_batch_end(self, *_: Any) -> None:
        scaler = self.trainer.scaler
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        with self.trainer.strategy.engine.full_parameters():
            self.steps.append((values(self), lr, scaler.get_scale(), scaler.skipped_steps))


class Plain(Recorded):
    def on_train_batch_end(self, *_: Any) -> None:
        return


def float32() -> Any:
    return loader(dtype=torch.float32)


def stock(**arguments: Any) -> pl.Trainer:
    """Lightning alone, with torch's scaler: fp16 on the CPU is to be had with a plugin only."""
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=SCALE))
    return alone(plugins=[plugin], **arguments)


def require_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    def flat(state: dict[str, Tensor]) -> Tensor:
        return torch.cat([value.flatten().double() for value in state.values()])

    moved = (flat(theirs) - flat(start)).norm()
    assert moved > 0.05, "training changed nothing: the comparison is void"
    error = (flat(ours) - flat(theirs)).norm() / moved
    assert 0 < error < HALF


# --------------------------------------------------------------------- trainer


def scaled(row: str, **arguments: Any) -> pl.Trainer:
    """A Trainer with fp16 from the precision flag alone."""
    used = trainer(f"accel_{row}", precision="16-mixed", **arguments)
    used.scaler.update(SCALE)
    return used


def fit(row: str, fused: bool, **arguments: Any) -> tuple[dict[str, Tensor], set[torch.dtype], list[float], str]:
    module = Plain(fused=fused)
    used = scaled(row, **arguments)
    used.fit(module, float32())
    return values(module), module.dtypes, module.norms, used.precision


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_fit_is_in_fp16_and_equals_a_single_process(ranks2: Ranks, row: str, clip: float | None) -> None:
    expected = Plain()
    stock(max_epochs=3, gradient_clip_val=clip).fit(expected, float32())
    for result, dtypes, norms, precision in ranks2.run(
        fit, row, clip is not None, max_epochs=3, gradient_clip_val=clip
    ):
        require_close(result, values(expected), values(Plain()))
        assert dtypes == {torch.float16}
        assert precision == "16-mixed"
        assert norms == pytest.approx(expected.norms, rel=HALF)  # unscaled: a scaled one is 2**10 times that
        assert len(norms) == (0 if clip is None else 12)


def overflow(row: str, **arguments: Any) -> list[Any]:
    module = Recorded(bad_rank=1)
    scaled(row, callbacks=[LossScaleMonitor()], log_every_n_steps=1, **arguments).fit(module, float32())
    return module.steps


@pytest.mark.parametrize("row", everyday(ROWS))
def test_an_overflow_on_one_rank_skips_the_step_and_the_schedule_of_all(ranks2: Ranks, row: str) -> None:
    results = ranks2.run(overflow, row, gradient_clip_val=0.5)
    for steps in results:
        parameters, rates, scales, skipped = zip(*steps, strict=True)
        assert skipped == (0, 1, 1, 1)
        assert scales == (SCALE, SCALE / 2, SCALE / 2, SCALE / 2)
        assert rates == pytest.approx([0.1 * 0.97**updates for updates in (1, 1, 2, 3)])
        for step, (before, after) in enumerate(zip(parameters, parameters[1:], strict=False), start=1):
            for name in before:
                assert bool(torch.isfinite(after[name]).all())
                assert torch.equal(before[name], after[name]) == (step == 1)
        for ours, first in zip(parameters, [step[0] for step in results[0]], strict=True):
            assert all(torch.equal(ours[name], first[name]) for name in ours), "ranks differ"


def monitored() -> tuple[dict[str, float], dict[str, float]]:
    module = Recorded(bad_rank=1)
    used = scaled("zero2", callbacks=[LossScaleMonitor()], log_every_n_steps=1)
    used.fit(module, float32())
    logged = {name: float(value) for name, value in used.callback_metrics.items() if name.startswith("accel/")}
    plain = trainer("accel_zero2", callbacks=[LossScaleMonitor()])
    plain.fit(Regression(), loader())
    return logged, {name: float(value) for name, value in plain.callback_metrics.items() if name.startswith("accel/")}


def test_the_monitor(ranks2: Ranks) -> None:
    for logged, plain in ranks2.run(monitored):
        assert logged == {"accel/loss_scale": SCALE / 2, "accel/skipped_steps": 1.0}
        assert plain == {}


class Manual(Plain):
    """Two optimizers that step in turn; the first one's gradients overflow once, on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def on_after_backward(self) -> None:
        return

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx == 1 and dist.get_rank() == 1:
            engine_of(self).optimizers[0].gradients.tensors()[-1][-1] = math.nan
        before = self.net.blocks[0].linear.bias, self.net.last.bias
        before = [value.detach().clone() for value in before]
        for optimizer in (first, second):
            self.clip_gradients(optimizer, 0.5, "norm")
            self.norms.append(float(engine_of(self).grad_norm(optimizer.optimizer)))
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        after = self.net.blocks[0].linear.bias, self.net.last.bias
        self.steps.append([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])

    def configure_optimizers(self) -> Any:
        blocks = list(self.net.blocks.parameters())
        others = [*self.net.first.parameters(), *self.net.last.parameters()]
        return [torch.optim.SGD(blocks, lr=0.1), torch.optim.Adam(others, lr=0.01)]


def fit_manually(row: str, common: bool) -> tuple[list[Any], list[float], int, float]:
    module = Manual()
    entry = StrategyRegistry[f"accel_{row}"]
    scaler = GradScaler(init_scale=SCALE, common_verdict=common)
    used = trainer(entry["strategy"](**entry["init_params"], grad_scaler=scaler), precision="16-mixed")
    used.fit(module, float32())
    return module.steps, module.norms, used.scaler.skipped_steps, used.scaler.get_scale()


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("row", everyday(["ddp", "zero1", "zero2"]))
def test_manual_optimization_with_verdicts_of_two_optimizers(ranks2: Ranks, row: str, common: bool) -> None:
    for moved, norms, skipped, scale in ranks2.run(fit_manually, row, common):
        # The norm that clipping leaves is that of unscaled gradients: scaled ones had been divided after it.
        assert max(norm for norm in norms if math.isfinite(norm)) == pytest.approx(0.5, rel=1e-5)
        assert moved == [[True, True], [False, not common], [True, True], [True, True]]
        assert (skipped, scale) == (1 + common, SCALE / 2)


# ------------------------------------------------------------------ checkpoints


def continue_from(strategy: str, path: str, given: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    module = Plain()
    arguments = {"max_epochs": 1 if given is None else 2}
    used = stock(**arguments) if strategy == "auto" else trainer(strategy, precision="16-mixed", **arguments)
    if given is None:
        used.strategy.precision_plugin.load_state_dict({**used.scaler.state_dict(), "scale": 1024.0})
    used.fit(module, float32(), ckpt_path=given)
    used.save_checkpoint(path)
    return opened(path)["MixedPrecision"], values(module)


def test_checkpoints_are_exchanged_with_lightnings_own(ranks2: Ranks, tmp_path: Path) -> None:
    theirs, ours, back = (str(tmp_path / name) for name in ("theirs", "ours", "back"))
    first, _ = continue_from("auto", theirs, None)
    assert (first["scale"], first["_growth_tracker"]) == (1024.0, 4)
    second, state = ranks2.run(continue_from, "accel_zero2", ours, theirs)[0]
    assert {name: second[name] for name in first} == {**first, "_growth_tracker": 8}
    third, _ = continue_from("auto", back, ours)
    assert third == {name: second[name] for name in third}  # two epochs were over
    straight, _ = continue_from("auto", theirs, theirs)
    assert straight == third
    assert state.keys() == values(Plain()).keys()


# ---------------------------------------------------------------- who scales how


@pytest.mark.parametrize("accelerator", ["cpu", "auto", CPUAccelerator()], ids=["cpu", "auto", "object"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_16_mixed_stays_what_it_is(row: str, accelerator: Any) -> None:
    used = pl.Trainer(strategy=f"accel_{row}", accelerator=accelerator, devices=2, precision="16-mixed", logger=False)
    fabric = Fabric(strategy=f"accel_{row}", accelerator=accelerator, devices=2, precision="16-mixed")
    for plugin, kind in [(used.precision_plugin, MixedPrecision), (fabric._precision, FabricMixedPrecision)]:
        assert type(plugin) is kind
        assert (plugin.precision, plugin.device) == ("16-mixed", "cpu")
        assert isinstance(plugin.scaler, GradScaler)
        assert plugin.scaler.get_scale() == 2.0**16
    assert used.scaler is used.strategy.grad_scaler
    assert fabric.strategy.grad_scaler is fabric._precision.scaler


def test_other_strategies_are_left_to_lightning() -> None:
    # If this fails, Lightning has changed what strategies/float16.py answers in its place.
    for made in (pl.Trainer, Fabric):
        with pytest.warns(match="fp16 is not supported on CPU. Using `precision='bf16-mixed'` instead"):
            used = made(accelerator="cpu", devices=1, precision="16-mixed")
        plugin = used.precision_plugin if made is pl.Trainer else used._precision
        assert plugin.precision == "bf16-mixed"


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_a_scaler_that_is_given_is_used(precision: Any) -> None:
    scaler = GradScaler("deepspeed", init_scale=128.0)
    strategy = AccelZeROStrategy(stage=2, grad_scaler=scaler)
    assert trainer(strategy, precision=precision).scaler is scaler
    twin = twins.AccelZeROStrategy(stage=2, grad_scaler=scaler)
    assert Fabric(accelerator="cpu", devices=2, strategy=twin, precision=precision)._precision.scaler is scaler


@pytest.mark.parametrize("kind", [MixedPrecision, FabricMixedPrecision])
def test_a_plugins_scaler_keeps_its_settings(kind: Any) -> None:
    def scaler_of(scaler: Any) -> Any:
        plugin = kind("16-mixed", device="cpu", scaler=scaler)
        if kind is MixedPrecision:
            return trainer("accel_fsdp", plugins=[plugin]).scaler
        return Fabric(accelerator="cpu", devices=2, strategy="accel_fsdp", plugins=[plugin])._precision.scaler

    ours = GradScaler("static", init_scale=8.0)
    assert scaler_of(ours) is ours
    theirs = torch.amp.GradScaler("cpu", init_scale=32.0, growth_interval=7)
    state = scaler_of(theirs).state_dict()
    assert {name: state[name] for name in theirs.state_dict()} == theirs.state_dict()


def test_a_scaler_with_a_precision_that_has_no_place_for_it() -> None:
    strategy = AccelZeROStrategy(stage=2, grad_scaler=GradScaler())
    with pytest.raises(ValueError, match="Expected precision='16-mixed' or 'bf16-mixed' together with grad_scaler"):
        trainer(strategy, precision="64-true")
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=GradScaler())
    with pytest.raises(ValueError, match="one gradient scaler, got one with the strategy and another"):
        trainer(AccelZeROStrategy(stage=2, grad_scaler=GradScaler()), plugins=[plugin])


def fit_checked() -> list[Any]:
    strategy = AccelZeROStrategy(stage=2, grad_scaler=GradScaler("static", init_scale=1.0))
    module = Recorded(bad_rank=0)
    trainer(strategy, precision="bf16-mixed").fit(module, float32())
    assert module.dtypes == {torch.bfloat16}
    return [(scale, skipped) for _, _, scale, skipped in module.steps]


def test_bf16_can_be_checked_for_overflow(ranks2: Ranks) -> None:
    for found in ranks2.run(fit_checked):
        assert found == [(1.0, 0), (1.0, 1), (1.0, 1), (1.0, 1)]


def fit_clipped(limit: float) -> None:
    trainer("accel_zero2", gradient_clip_val=limit).fit(Regression(), loader())


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_limits_that_clip_nothing(ranks2: Ranks, limit: float) -> None:
    for error in ranks2.run_expecting_error(fit_clipped, limit):
        assert error == (
            "ValueError",
            f"Expected gradient_clip_val to be positive, or None or 0 for no clipping, got {limit}.",
        )


# ---------------------------------------------------------------------- fabric


def loop(strategy: str, bad: bool, clip: dict[str, Any]) -> tuple[list[dict[str, Tensor]], list[float], Any, Any]:
    """Parameters after each step, norms, the autocast dtype, and how many steps were skipped."""
    if strategy == "auto":
        plugin = FabricMixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=SCALE))
        fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    else:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=f"accel_{strategy}", precision="16-mixed")
        fabric.strategy.grad_scaler.update(SCALE)
    fabric.launch()
    net = Net(dtype=torch.float32)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, fused=strategy != "auto"))
    seen, norms, dtypes = [], [], set()
    net.blocks[0].linear.register_forward_hook(lambda _module, _args, output: dtypes.add(output.dtype))
    for step, (_, x, y) in enumerate(float32()):
        fabric.backward(nn.functional.mse_loss(model(x), y))
        if bad and step == 1 and dist.get_rank() == 1:
            engine_of(net).optimizers[0].gradients.tensors()[-1][-1] = math.inf
        if clip:
            norm = fabric.clip_gradients(model, optimizer, **clip)
            norms += [] if norm is None else [float(norm)]
        optimizer.step()
        optimizer.zero_grad()
        seen.append(values(net) if strategy == "auto" else _whole(net))
    skipped = 0 if strategy == "auto" else fabric.strategy.grad_scaler.skipped_steps
    return seen, norms, dtypes, skipped


def _whole(net: nn.Module) -> dict[str, Tensor]:
    with engine_of(net).full_parameters():
        return values(net)


@pytest.mark.parametrize("clip", [{}, {"max_norm": 0.5}, {"clip_val": 0.05}], ids=["plain", "norm", "value"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_loop_equals_a_single_process(ranks2: Ranks, row: str, clip: dict[str, float]) -> None:
    expected, expected_norms, _, _ = loop("auto", False, clip)
    for seen, norms, dtypes, skipped in ranks2.run(loop, row, False, clip):
        require_close(seen[-1], expected[-1], values(Net(dtype=torch.float32)))
        assert norms == pytest.approx(expected_norms, rel=HALF)
        assert dtypes == {torch.float16}
        assert skipped == 0


@pytest.mark.parametrize("row", everyday(ROWS))
def test_an_overflow_on_one_rank_skips_the_step_of_all(ranks2: Ranks, row: str) -> None:
    results = ranks2.run(loop, row, True, {"max_norm": 0.5, "error_if_nonfinite": False})
    for rank, (seen, norms, _, skipped) in enumerate(results):
        assert skipped == 1
        bad = row != "ddp" or rank == 1  # replicated, the Inf is in the gradients of its own rank only
        assert [math.isfinite(norm) for norm in norms] == [True, not bad, True, True]
        for step, (before, after) in enumerate(zip(seen, seen[1:], strict=False), start=1):
            assert all(torch.equal(before[name], after[name]) for name in before) == (step == 1)
        for ours, first in zip(seen, results[0][0], strict=True):
            assert all(torch.equal(ours[name], first[name]) for name in ours), "ranks differ"


@pytest.mark.parametrize("row", everyday(ROWS[1:]))
def test_an_overflow_is_an_error_if_asked_for(ranks2: Ranks, row: str) -> None:
    for error in ranks2.run_expecting_error(loop, row, True, {"max_norm": 0.5}):  # which is what Fabric's default asks
        assert error is not None
        assert error[0] == "RuntimeError"
        assert "is inf, so it cannot be clipped" in error[1]
