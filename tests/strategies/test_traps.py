"""One test for each trap of DESIGN.md, section 8: what Lightning does to a strategy that does not look out."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from models import (
    FLOAT64,
    REPLICATED,
    ROWS,
    ArriveLate,
    Net,
    Regression,
    Samples,
    alone,
    assert_close,
    loader,
    trainer,
    values,
)
from processes import run_script
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from harness import Ranks
from lightning_accel.core.placeholder import ShardedGradient
from lightning_accel.strategies import AccelDDPStrategy, AccelFSDPStrategy, AccelZeROStrategy
from opened import opened
from rows import everyday

STRATEGIES: dict[str, Any] = {
    "ddp": lambda **options: AccelDDPStrategy(**options),
    "zero1": lambda **options: AccelZeROStrategy(stage=1, **options),
    "zero2": lambda **options: AccelZeROStrategy(stage=2, **options),
    "fsdp": lambda **options: AccelFSDPStrategy(**options),
    "fsdp_partial": lambda **options: AccelFSDPStrategy(sharding="partial", **options),
}

EXACT = {"32-true": 1e-5, "64-true": FLOAT64}
"""Precisions that let the result be compared with a single process's, with the tolerances of the parity matrix."""

# ---------------------------------------------------------------------- is_distributed: samplers


class Watching(Regression):
    """Notes which samples it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": []}

    def on_train_epoch_start(self) -> None:
        self.seen["train"].append([])

    def on_validation_epoch_start(self) -> None:
        self.seen["val"].append([])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"][-1] += batch[0].tolist()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["val"][-1] += batch[0].tolist()


def seen_samples(row: str) -> tuple[dict[str, list[list[int]]], list[bool]]:
    module = Watching()
    used = trainer(f"accel_{row}", max_epochs=2)
    used.fit(module, DataLoader(Samples(), batch_size=4, shuffle=True), DataLoader(Samples(), batch_size=4))
    loaders = [used.train_dataloader, used.val_dataloaders]
    return module.seen, [isinstance(loader.sampler, DistributedSampler) for loader in loaders]


@pytest.mark.parametrize("row", everyday(ROWS))
def test_distributed_samplers_are_injected(ranks2: Ranks, row: str) -> None:
    (first, injected), (second, _) = ranks2.run(seen_samples, row)
    assert injected == [True, True]
    for mine, theirs in zip(first["train"], second["train"], strict=True):
        assert sorted(mine + theirs) == list(range(32))  # every sample once, on one rank
        assert sorted(mine) != mine  # shuffled
    assert first["train"][0] != first["train"][1]  # anew in each epoch
    assert first["val"] == [list(range(0, 32, 2))] * 2
    assert second["val"] == [list(range(1, 32, 2))] * 2


# ---------------------------------------------------------------------- is_distributed: sync_dist


class Logging(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rank = float(self.global_rank)
        self.log("synced", rank, sync_dist=True)
        self.log("summed", rank + 1, sync_dist=True, reduce_fx="sum", on_epoch=True, on_step=False)
        self.log("whole", self.global_rank, sync_dist=True)  # an integer
        self.log("own", rank)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_synced", float(self.global_rank), sync_dist=True)


def logged(row: str) -> dict[str, float]:
    used = trainer(f"accel_{row}")
    used.fit(Logging(), loader(), loader())
    return {name: value.item() for name, value in used.callback_metrics.items() if "loss" not in name}


@pytest.mark.parametrize("row", everyday(ROWS))
def test_sync_dist_reduces(ranks2: Ranks, row: str) -> None:
    for rank, metrics in enumerate(ranks2.run(logged, row)):
        # 4 batches: the sum of 1 from rank 0 and 2 from rank 1 over all of them is 12.
        assert metrics == {"synced": 0.5, "summed": 12.0, "whole": 0.5, "val_synced": 0.5, "own": float(rank)}


# ---------------------------------------------------------------------- inference_mode


class Modes(Regression):
    """Notes in which mode evaluation runs, and makes a buffer there that training goes on to write to."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: dict[str, tuple[bool, bool]] = {}
        self.register_buffer("made", None)

    def note(self) -> None:
        stage = self.trainer.state.stage.value
        self.modes[f"{self.trainer.state.fn.value}/{stage}"] = (
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.made is not None:
            self.made += 1  # an inference tensor would refuse
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note()
        self.made = torch.zeros(3)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note()

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.note()


def evaluation_modes(row: str) -> dict[str, tuple[bool, bool]]:
    module = Modes()
    used = trainer(f"accel_{row}", max_epochs=2, num_sanity_val_steps=1)
    used.fit(module, loader(), loader())
    used.validate(module, loader(), verbose=False)
    used.test(module, loader(), verbose=False)
    used.predict(module, loader())
    return module.modes


@pytest.mark.parametrize("row", everyday(ROWS))
def test_evaluation_runs_without_inference_mode(ranks2: Ranks, row: str) -> None:
    stages = ["fit/sanity_check", "fit/validate", "validate/validate", "test/test", "predict/predict"]
    for modes in ranks2.run(evaluation_modes, row):
        assert modes == dict.fromkeys(stages, (False, False))  # no inference mode, no gradients


# ---------------------------------------------------------------------- compile whitelist


class Silent(Regression):
    """Does not log: torch 2.13 cannot trace Lightning's `self.log`, whatever the strategy."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


def fit_compiled(row: str, backend: str | None, compile_units: bool) -> dict[str, Tensor]:
    module = Silent()
    options = {"compile": {"backend": backend}} if compile_units else {}
    compiled = torch.compile(module, backend=backend) if backend and not compile_units else module
    used = trainer(STRATEGIES[row](**options), max_epochs=2, callbacks=[ArriveLate()])
    used.fit(compiled, loader(), loader(size=16))
    return values(module)


@pytest.mark.parametrize(
    ("backend", "compile_units"),
    [("eager", False), ("aot_eager", False), ("aot_eager", True)],
    ids=["module, eager", "module, aot_eager", "units"],
)
@pytest.mark.parametrize("row", everyday(ROWS))
def test_compiled_lightning_module_trains(ranks2: Ranks, row: str, backend: str, compile_units: bool) -> None:
    plain = ranks2.run(fit_compiled, row, None, False)
    for result, expected in zip(ranks2.run(fit_compiled, row, backend, compile_units), plain, strict=True):
        assert_close(result, expected)


# ---------------------------------------------------------------------- precision choice


class Clipped(Regression):
    """Notes the norm of the gradients that are stepped with."""

    def __init__(self) -> None:
        super().__init__(optimizer="AdamW", fused=True)
        self.float()
        self.norms: list[float] = []
        self.kinds: set[type] = set()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.kinds |= {type(parameter.grad) for parameter in self.parameters()}

    def configure_gradient_clipping(self, optimizer: Any, *arguments: Any, **more: Any) -> None:
        super().configure_gradient_clipping(optimizer, *arguments, **more)
        engine = getattr(self.trainer.strategy, "engine", None)
        if engine is not None:
            self.norms.append(engine.clip_grad_norm_(optimizer, float("inf")).item())


def fit_clipped(strategy: str, precision: Any, clip: float) -> tuple[dict[str, Tensor], list[float], set[type]]:
    module = Clipped()
    arguments = {"precision": precision, "gradient_clip_val": clip}
    used = alone(**arguments) if strategy == "auto" else trainer(f"accel_{strategy}", **arguments)
    used.fit(module, loader(dtype=torch.float32))
    return values(module), module.norms, module.kinds


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_every_precision_plugin_clips_through_the_engine(ranks2: Ranks, row: str, precision: str) -> None:
    clip = 0.02
    for _, free, _ in ranks2.run(fit_clipped, row, precision, 1e9):
        assert min(free) > 2 * clip  # there is something to clip
    # bfloat16 rounds by up to 2**-9: the norm, the factor, the scaled gradients and their norm. Otherwise what tells is
    # that torch adds 1e-6 to the norm before it divides by it.
    tolerance = 4 * 2**-9 if precision == "bf16-true" else 1e-4
    expected = fit_clipped("auto", precision, clip)[0] if precision in EXACT else {}
    for result, norms, kinds in ranks2.run(fit_clipped, row, precision, clip):
        assert norms == pytest.approx([clip] * 4, rel=tolerance)
        # A stock plugin would find no gradients to clip where they rest sharded: they are only stood for.
        assert kinds == {Tensor if row == "ddp" else ShardedGradient}
        if expected:
            assert_close(result, expected, EXACT[precision])


# ---------------------------------------------------------------------- restore_checkpoint_after_setup


class Editing(Regression):
    """Changes what it is restored from, and notes what arrives."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.first.bias"].fill_(5.0)
        checkpoint["optimizer_states"][0]["state"][1]["exp_avg"].fill_(7.0)

    def on_train_start(self) -> None:
        self.bias = self.net.first.bias.detach().clone()
        state = self.optimizers().optimizer.state_dict()
        self.average = state["state"][1]["exp_avg"] if state else None


class Recording(TorchCheckpointIO):
    """Notes the arguments it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[str] = []
        self.weights_only: list[bool | None] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.saved.append(Path(path).name)
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        self.weights_only.append(weights_only)
        return super().load_checkpoint(path, map_location, weights_only)


def restore(row: str, path: Path, weights_only: bool | None) -> tuple[Tensor, Tensor | None, list[bool | None]]:
    recording = Recording()
    module = Editing()
    used = trainer(f"accel_{row}", max_epochs=2, plugins=[recording])
    assert used.strategy.restore_checkpoint_after_setup is False
    used.fit(module, loader(), ckpt_path=path, weights_only=weights_only)
    return module.bias, module.average, recording.weights_only


@pytest.mark.parametrize("weights_only", [None, False, True])
@pytest.mark.parametrize("row", everyday(REPLICATED))
def test_checkpoint_is_restored_before_setup(
    ranks2: Ranks, row: str, weights_only: bool | None, tmp_path: Path
) -> None:
    used = alone()
    used.fit(Regression(), loader())
    used.save_checkpoint(tmp_path / "stopped.ckpt")
    results = ranks2.run(restore, row, tmp_path / "stopped.ckpt", weights_only)
    for bias, _, passed in results:
        assert bias.tolist() == [5.0] * 5
        assert passed == [weights_only]
    assert results[0][1] is not None
    assert results[0][1].tolist() == [7.0] * 5


# ---------------------------------------------------------------------- spawn launcher


@pytest.mark.parametrize("strategy", [pytest.param("accel_zero2_spawn", marks=pytest.mark.matrix), "accel_zero1_fork"])
def test_spawned_ranks_bring_weights_and_metrics_back(strategy: str, tmp_path: Path) -> None:
    finished = run_script("--strategy", strategy, "--save", str(tmp_path / "result.pt"))
    assert finished.code == 0, finished.stderr
    assert finished.left == []
    result = torch.load(tmp_path / "result.pt")
    module, used = Regression(), alone()
    used.fit(module, loader())
    assert_close(result["values"], values(module))
    assert result["metrics"].keys() == used.callback_metrics.keys()


# ---------------------------------------------------------------------- training_step


class Growing(Regression):
    """Has one more layer after its first step, of which no optimizer or rank was told."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.net.more = nn.Linear(2, 2)


def fit_growing(row: str) -> None:
    trainer(f"accel_{row}").fit(Growing(), loader())


def test_training_step_passes_by_the_engine(ranks2: Ranks) -> None:
    for error in ranks2.run_expecting_error(fit_growing, "zero2"):
        assert error is not None
        assert error[0] == "RuntimeError"
        assert "'net.more.weight' was added" in error[1]


# ---------------------------------------------------------------------- block_backward_sync


class Traffic(pl.Callback):
    """Notes what was sent since the last optimizer step, each time a backward is over."""

    def __init__(self) -> None:
        self.operations: list[dict[str, int]] = []
        self.sent: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.engine.collectives.traffic.take()  # what setting up has sent

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = trainer.strategy.engine
        self.units = len(engine.units)
        self.operations.append(dict(engine.collectives.traffic.operations))
        self.sent.append(sum(engine.collectives.traffic.bytes_sent.values()))


def traffic_of_accumulation(row: str) -> Traffic:
    traffic = Traffic()
    strategy = STRATEGIES[row](bucket_cap_mb=1e-4)  # so that there are several units
    trainer(strategy, accumulate_grad_batches=4, callbacks=[traffic]).fit(Regression(), loader(size=64))
    return traffic


@pytest.mark.parametrize("row", everyday(ROWS))
def test_block_backward_sync_sends_nothing_between_boundaries(ranks2: Ranks, row: str) -> None:
    for traffic in ranks2.run(traffic_of_accumulation, row):
        assert traffic.units > 2
        kind = "all_reduce" if row == "ddp" else "reduce_scatter"
        # From zero2 on gradients rest sharded between the batches, too: they are reduced after each of them.
        sharded = row not in ("ddp", "zero1")
        reductions = [1, 2, 3, 4] if sharded else [0, 0, 0, 1]
        assert [counts.get(kind, 0) for counts in traffic.operations] == [n * traffic.units for n in reductions] * 2
        if not sharded:
            assert traffic.sent[:3] == traffic.sent[4:7] == [0, 0, 0]


# ------------------------------------------ StochasticWeightAveraging and weight averaging (EMA)


def fit_averaging(strategy: str, kind: str) -> dict[str, Tensor]:
    average = {
        "stochastic": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1),
        "moving": lambda: EMAWeightAveraging(decay=0.8),
        "derived": lambda: MovingAverage(decay=0.8),
    }[kind]()
    module = Regression()
    arguments = {"max_epochs": 4, "callbacks": [average, ArriveLate()]}
    used = alone(**arguments) if strategy == "auto" else trainer(f"accel_{strategy}", **arguments)
    used.fit(module, loader(), loader(size=16))
    return values(module)


@pytest.mark.parametrize("kind", ["stochastic", "moving"])
@pytest.mark.parametrize("row", everyday(REPLICATED))
def test_weight_averaging_callbacks(ranks2: Ranks, row: str, kind: str) -> None:
    expected = fit_averaging("auto", kind)
    for result in ranks2.run(fit_averaging, row, kind):
        assert_close(result, expected)


class MovingAverage(EMAWeightAveraging):
    """As Lightning's documentation suggests to write it."""


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("stochastic", "StochasticWeightAveraging"),
        ("moving", "EMAWeightAveraging"),
        ("derived", "EMAWeightAveraging"),
    ],
)
@pytest.mark.parametrize("row", everyday(["fsdp", "fsdp_partial"]))
def test_weight_averaging_of_sharded_parameters_names_what_to_use(ranks2: Ranks, row: str, kind: str, use: str) -> None:
    for error in ranks2.run_expecting_error(fit_averaging, row, kind):
        assert error is not None
        assert error[0] == "ValueError"
        assert f"Use (or derive from) lightning_accel.callbacks.{use}:" in error[1]


# ---------------------------------------------------------------------- reduce of integer metrics


def mean_of_ranks(row: str) -> list[Any]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=f"accel_{row}")
    fabric.launch()
    strategy = trainer(f"accel_{row}").strategy
    rank = dist.get_rank()
    means = [strategy.reduce(torch.tensor(rank)), fabric.all_reduce(torch.tensor(rank))]
    means += [strategy.reduce(torch.tensor(rank == 1)), fabric.all_reduce(torch.tensor([rank == 1, True]))]
    sums = [
        strategy.reduce(torch.tensor(rank), reduce_op="sum"),
        fabric.all_reduce(torch.tensor(rank), reduce_op="sum"),
    ]
    return [value.tolist() for value in means + sums]


@pytest.mark.parametrize("row", everyday(ROWS))
def test_mean_of_integers_is_not_floored(ranks2: Ranks, row: str) -> None:
    assert ranks2.run(mean_of_ranks, row) == [[0.5, 0.5, 0.5, [0.5, 1.0], 1, 1]] * 2


# ---------------------------------------------------------------------- Fabric


class WithLoss(Net):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self(x), y)


def fabric_loop(row: str, marked: bool) -> tuple[dict[str, Tensor], list[bool]]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=f"accel_{row}")
    fabric.launch()
    network = WithLoss()
    model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=0.02))
    if marked:
        model.mark_forward_method("loss")
    losses = []
    for _, x, y in loader():
        optimizer.zero_grad()
        loss = model.loss(x, y) if marked else nn.functional.mse_loss(model(x), y)
        fabric.backward(loss)
        losses.append(optimizer.step(lambda loss=loss: loss) is loss)
    assert not hasattr(fabric.strategy, "model")
    return values(network), losses


@pytest.mark.parametrize("row", everyday(ROWS))
def test_fabric_marked_forward_method(ranks2: Ranks, row: str) -> None:
    plain = ranks2.run(fabric_loop, row, False)
    for (result, _), (expected, _) in zip(ranks2.run(fabric_loop, row, True), plain, strict=True):
        assert_close(result, expected, tolerance=0)


@pytest.mark.parametrize("row", everyday(ROWS))
def test_fabric_optimizer_step_is_the_optimizers(ranks2: Ranks, row: str) -> None:
    for _, returned in ranks2.run(fabric_loop, row, False):
        assert returned == [True] * 4  # what the closure returns; Fabric would call `strategy.model.step` otherwise


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["accel_zero2", "accel_zero2_spawn"])
def test_fabric_script_may_end_without_teardown(strategy: str) -> None:
    finished = run_script("--strategy", strategy, "--fabric")
    assert finished.code == 0, finished.stderr
    assert finished.left == []
    assert "Traceback" not in finished.stderr


# ---------------------------------------------------------------------- async checkpoint IO


class Broken(TorchCheckpointIO):
    """Fails in the background, but only when training is over: a failure that nobody meets while saving."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.over.wait(timeout=60)
        raise OSError("disk full")


class TellOver(pl.Callback):
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.checkpoint_io.checkpoint_io.over.set()


def fit_with_async_io(row: str, folder: Path) -> list[str]:
    recording = Recording()
    plugin = AsyncCheckpointIO(recording)
    save = ModelCheckpoint(folder, filename="{epoch}")
    used = trainer(f"accel_{row}", plugins=[plugin], callbacks=[save], enable_checkpointing=True)
    used.fit(Regression(), loader())
    assert used.strategy.checkpoint_io is plugin
    assert plugin.checkpoint_io is recording
    return recording.saved


@pytest.mark.parametrize("row", everyday(ROWS))
def test_async_io_keeps_what_it_wraps(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    assert ranks2.run(fit_with_async_io, row, tmp_path) == [["epoch=0.ckpt"], []]
    assert opened(tmp_path / "epoch=0.ckpt")["epoch"] == 0


def fit_with_broken_io(row: str, folder: Path) -> None:
    arguments = {"plugins": [AsyncCheckpointIO(Broken())], "enable_checkpointing": True}
    trainer(f"accel_{row}", callbacks=[TellOver(), ModelCheckpoint(folder)], **arguments).fit(Regression(), loader())


@pytest.mark.parametrize("row", everyday(ROWS))
def test_async_io_raises_in_teardown_what_failed_in_the_background(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    assert ranks2.run_expecting_error(fit_with_broken_io, row, tmp_path) == [("OSError", "disk full"), None]


def fit_with_default_async_io(row: str, folder: Path) -> str:
    save = ModelCheckpoint(folder, filename="{epoch}")
    used = trainer(f"accel_{row}", plugins=[AsyncCheckpointIO()], callbacks=[save], enable_checkpointing=True)
    used.fit(Regression(), loader())
    return type(used.strategy.checkpoint_io.checkpoint_io).__name__


def test_async_io_that_wraps_nothing_wraps_our_own(ranks2: Ranks, tmp_path: Path) -> None:
    assert ranks2.run(fit_with_default_async_io, "zero1", tmp_path) == ["AccelCheckpointIO"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]
