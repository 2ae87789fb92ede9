"""What AccelFSDPStrategy adds to the settings of all strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.strategies import StrategyRegistry
from models import Net, Regression, alone, assert_close, loader, trainer, values
from torch import Tensor, nn

from harness import Ranks
from lightning_accel import engine_of
from lightning_accel.core.absent import AbsenceError
from lightning_accel.strategies import AccelDDPStrategy, AccelFSDPStrategy, fabric

SETTINGS = {
    "hybrid": {"sharding": "hybrid", "shard_size": 2},
    "local accumulation": {"local_accumulation": True},
    "partial, local accumulation": {"sharding": "partial", "local_accumulation": True},
    "hybrid, local accumulation": {"sharding": "hybrid", "shard_size": 2, "local_accumulation": True},
}
CLIPPING = [{"gradient_clip_val": 0.3}, {"gradient_clip_val": 0.03, "gradient_clip_algorithm": "value"}]


@pytest.fixture(scope="module")
def ranks4(ranks_of: Any) -> Ranks:
    return ranks_of(4)


def fit(settings: dict[str, Any] | None, ckpt_path: Path | None = None, **arguments: Any) -> dict[str, Tensor]:
    module = Regression()
    if settings is None:
        made = alone(**arguments)
    else:
        made = trainer(AccelFSDPStrategy(**settings), devices=dist.get_world_size(), **arguments)
    made.fit(module, loader(), ckpt_path=ckpt_path)
    return values(module)


@pytest.mark.parametrize(
    "clipping", [CLIPPING[0], pytest.param(CLIPPING[1], marks=pytest.mark.matrix)], ids=["norm", "value"]
)
@pytest.mark.parametrize("name", SETTINGS)
def test_fit_equals_a_single_process(ranks4: Ranks, name: str, clipping: dict[str, Any]) -> None:
    arguments = {"max_epochs": 10, "accumulate_grad_batches": 3, **clipping}  # the last window has one batch only
    expected = fit(None, **arguments)
    for result in ranks4.run(fit, SETTINGS[name], **arguments):
        assert_close(result, expected)


def fit_and_save(settings: dict[str, Any] | None, path: Path) -> None:
    module = Regression()
    if settings is None:
        made = alone(max_epochs=2)
    else:
        made = trainer(AccelFSDPStrategy(**settings), devices=dist.get_world_size(), max_epochs=2)
    made.fit(module, loader())
    made.save_checkpoint(path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, SETTINGS["hybrid"]),
        (SETTINGS["hybrid"], None),
        (SETTINGS["hybrid"], SETTINGS["hybrid"]),
        (SETTINGS["hybrid"], {"sharding": "full"}),
        ({"sharding": "full"}, SETTINGS["hybrid"]),
    ],
    ids=["alone to hybrid", "hybrid to alone", "hybrid", "hybrid to full", "full to hybrid"],
)
def test_checkpoints_go_from_and_to_hybrid(
    ranks4: Ranks, before: dict[str, Any] | None, after: dict[str, Any] | None, tmp_path: Path
) -> None:
    path = tmp_path / "two_epochs.ckpt"
    if before is None:
        fit_and_save(None, path)
    else:
        ranks4.run(fit_and_save, before, path)
    expected = fit(None, max_epochs=4)
    results = [fit(None, path, max_epochs=4)] if after is None else ranks4.run(fit, after, path, max_epochs=4)
    for result in results:
        assert_close(result, expected)


def loop(settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, int], dict[str, int]]:
    """A Fabric loop over windows of four micro-batches."""
    made = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=fabric.AccelFSDPStrategy(**settings))
    made.launch()
    net = Net()
    model, optimizer = made.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))
    for _ in range(5):
        for index, (_, x, y) in enumerate(loader()):
            with made.no_backward_sync(model, enabled=index < 3):
                made.backward(nn.functional.mse_loss(model(x), y) / 4)
        made.clip_gradients(model, optimizer, max_norm=0.3)
        optimizer.step()
        optimizer.zero_grad()
    report = engine_of(model).report()
    return values(net), report.collectives, report.at_rest


def alone_in_a_loop() -> dict[str, Tensor]:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    for _ in range(5):
        for _, x, y in loader():
            (nn.functional.mse_loss(net(x), y) / 4).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("settings", [*SETTINGS.values(), {}], ids=[*SETTINGS, "full"])
def test_fabric_loop_equals_a_single_process(ranks4: Ranks, settings: dict[str, Any]) -> None:
    expected = alone_in_a_loop()
    size = sum(value.numel() * 8 for value in expected.values())
    blocks, others = 3, 2  # units: one for each block, what comes before them and what comes after
    for result, operations, at_rest in ranks4.run(loop, settings):
        assert_close(result, expected)
        if settings.get("local_accumulation"):
            # One gather for the whole window, one more for the last backward; one reduction.
            twice = 0 if settings.get("sharding") == "partial" else blocks
            assert operations["all_gather"] == blocks + others + twice
            assert operations["reduce_scatter"] == blocks + others
            assert at_rest["gradients"] >= size
        else:
            assert operations["all_gather"] == 4 * (2 * blocks + others)
            assert operations["reduce_scatter"] == 4 * (blocks + others)
            assert at_rest["gradients"] < size * 0.6 + 1024  # the padding of five tiny units counts here
        if settings.get("sharding") == "hybrid":
            assert operations["all_reduce"] == blocks + others


# ---------------------------------------------------------------------- offload


@pytest.mark.parametrize("name", ["hybrid", "partial, local accumulation"])
def test_fit_with_state_in_files(ranks4: Ranks, name: str, tmp_path: Path) -> None:
    arguments = {"max_epochs": 10, "accumulate_grad_batches": 3, "gradient_clip_val": 0.3}
    expected = fit(None, **arguments)
    settings = {
        **SETTINGS[name],
        "offload": "parameters",
        "offload_dir": str(tmp_path),
        "activation_checkpointing": True,
    }
    for result in ranks4.run(fit, settings, **arguments):
        assert_close(result, expected)


# ---------------------------------------------------------------------- starting on the meta device


class Layers(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 8), *[nn.Linear(8, 8) for _ in range(3)], nn.Linear(8, 3))


class Late(Regression):
    """Makes its model when it is asked to."""

    def __init__(self, empty: bool) -> None:
        super().__init__()
        self.net = None
        self.empty = empty

    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("meta" if self.empty else "cpu"):
                self.net = Layers().double()


def fit_late(strategy: str, how: str) -> tuple[dict[str, Tensor], bool]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    made = alone(max_epochs=3) if strategy == "auto" else trainer(f"accel_{strategy}", max_epochs=3)
    torch.manual_seed(11 + rank)  # rank 0's numbers are what counts
    torch.set_default_dtype(torch.float64)
    try:
        if how == "init_module":
            module = Regression()
            with made.init_module(empty_init=strategy != "auto"):
                module.net = Layers()
        else:
            module = Late(empty=strategy != "auto")
        on_meta = module.net is not None and all(p.is_meta for p in module.net.parameters())
        made.fit(module, loader())
    finally:
        torch.set_default_dtype(torch.float32)
    return values(module), on_meta


@pytest.mark.parametrize("how", ["init_module", "configure_model"])
@pytest.mark.parametrize("row", ["ddp", "zero2", "fsdp", "fsdp_partial"])
def test_fit_of_a_model_on_the_meta_device(ranks2: Ranks, row: str, how: str) -> None:
    expected, _ = fit_late("auto", how)
    for result, on_meta in ranks2.run(fit_late, row, how):
        assert_close(result, expected)
        assert on_meta == (how == "init_module")


def fit_twice(strategy: str) -> tuple[dict[str, Tensor], list[float], int]:
    """Two fits of one module with one Trainer, with tests in between; and the most bytes of whole parameters."""
    torch.set_default_dtype(torch.float64)
    try:
        made = alone(max_epochs=2) if strategy == "auto" else trainer(f"accel_{strategy}", max_epochs=2)
        torch.manual_seed(11)
        module = Late(empty=strategy != "auto")
        losses = []
        for epochs in (2, 4):
            made.fit_loop.max_epochs = epochs
            made.fit(module, loader())
            losses.append(made.test(module, loader(), verbose=False)[0]["test_loss"])
        if strategy == "auto":
            return values(module), losses, 0
        engine = engine_of(module)
        assert engine is made.strategy.engine
        for parameter in module.parameters():
            with pytest.raises(AbsenceError, match="rest sharded over the ranks"):
                parameter.sum()
        gathered = engine.report().gathered
        with pytest.raises(RuntimeError, match="got a AdamW of a fit that has ended"):
            made.optimizers[0].step()
        return values(module), losses, gathered
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_that_came_without_values_is_never_whole(ranks2: Ranks) -> None:
    expected, expected_losses, _ = fit_twice("auto")
    for result, losses, gathered in ranks2.run(fit_twice, "fsdp"):
        assert_close(result, expected)
        assert losses == pytest.approx(expected_losses, rel=1e-12)
        whole = 8 * sum(value.numel() for value in expected.values())
        assert 0 < gathered < whole


def fit_in_parts(**arguments: Any) -> tuple[Any, Late, dict[str, Tensor]]:
    torch.manual_seed(11)
    made, module = trainer("accel_fsdp", **arguments), Late(empty=True)
    made.fit(module, loader())
    assert engine_of(module) is made.strategy.engine
    return made, module, values(module)


def go_on_elsewhere(strategy: str, path: Path | None) -> list[float]:
    torch.set_default_dtype(torch.float64)
    try:
        made, module, _ = fit_in_parts()
        if path is not None:
            made.save_checkpoint(path)
        other = trainer(strategy)
        losses = [
            made.validate(module, loader(), verbose=False)[0]["val_loss"],
            other.validate(module, loader(), ckpt_path=path, verbose=False)[0]["val_loss"],
            made.validate(module, loader(), verbose=False)[0]["val_loss"],
        ]
        other.fit(module, loader())
        assert all(value.isfinite().all() for value in values(module).values())
        return losses
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("strategy", "saves"), [("accel_fsdp", True), ("accel_fsdp", False), ("accel_ddp", False)])
def test_a_model_in_parts_goes_on_with_another_trainer(
    ranks2: Ranks, strategy: str, saves: bool, tmp_path: Path
) -> None:
    for losses in ranks2.run(go_on_elsewhere, strategy, tmp_path / "a.ckpt" if saves else None):
        assert losses == pytest.approx(losses[:1] * 3, rel=1e-12)


def fit_with_another_head() -> tuple[bool, bool]:
    torch.set_default_dtype(torch.float64)
    try:
        made, module, _ = fit_in_parts()
        module.net[4] = nn.Linear(8, 3)
        before = module.net[4].weight.detach().clone()
        made.fit_loop.max_epochs = 2
        made.fit(module, loader())
        changed = not torch.equal(values(module)["net.4.weight"], before)
        return changed, all(value.isfinite().all() for value in values(module).values())
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_in_parts_may_get_another_head(ranks2: Ranks) -> None:
    assert ranks2.run(fit_with_another_head) == [(True, True)] * 2


class Mistaken(pl.Callback):
    """Fails before a stage has begun."""

    is_on = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.is_on:
            raise ValueError("a mistake")


def mistake_before_a_stage() -> bool:
    torch.set_default_dtype(torch.float64)
    try:
        mistaken = Mistaken()
        made, module, before = fit_in_parts(callbacks=[mistaken])
        mistaken.is_on = True
        with pytest.raises(ValueError, match="a mistake"):
            made.test(module, loader())
        mistaken.is_on = False
        made.test(module, loader(), verbose=False)
        return all(torch.equal(value, before[name]) for name, value in values(module).items())
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_in_parts_outlives_an_error_before_the_next_stage(ranks2: Ranks) -> None:
    assert ranks2.run(mistake_before_a_stage) == [True] * 2


class Normalised(Late):
    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("meta"):
                self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def kinds_after_fit() -> list[str]:
    module = Normalised(empty=True)
    # No batch: torch has synchronised BatchNorm for devices only.
    made = trainer("accel_fsdp", sync_batchnorm=True, max_epochs=0)
    made.fit(module, loader())
    assert engine_of(module) is made.strategy.engine
    return [type(part).__name__ for part in module.net]


def test_a_model_in_parts_has_its_own_batch_norm_after_fit(ranks2: Ranks) -> None:
    for kinds in ranks2.run(kinds_after_fit):
        assert "SyncBatchNorm" not in kinds


def evaluate_on_meta(row: str) -> dict[str, Tensor]:
    torch.manual_seed(11)
    module = Late(empty=True)
    trainer(f"accel_{row}").validate(module, loader(), verbose=False)
    return values(module)


@pytest.mark.parametrize("row", ["ddp", "fsdp"])
def test_evaluation_of_a_model_on_the_meta_device(ranks2: Ranks, row: str) -> None:
    one, other = ranks2.run(evaluate_on_meta, row)
    assert_close(one, other, tolerance=0)
    assert all(value.isfinite().all() for value in one.values())


def fail_on_meta() -> None:
    module = Late(empty=True)
    trainer(AccelFSDPStrategy(units=["nowhere"])).fit(module, loader())


def test_an_error_in_setup_is_not_hidden_by_what_lightning_does_next(ranks2: Ranks) -> None:
    for error in ranks2.run_expecting_error(fail_on_meta):
        assert error is not None
        assert "'nowhere' matches nothing" in error[1]


def ones(part: nn.Module) -> None:
    for parameter in part.parameters(recurse=False):
        nn.init.constant_(parameter, 0.5)


def fabric_on_meta(row: str) -> dict[str, Tensor]:
    kind = fabric.AccelDDPStrategy if row == "ddp" else fabric.AccelFSDPStrategy
    made = Fabric(accelerator="cpu", devices=2, strategy=kind(param_init_fn=ones))
    made.launch()
    with made.init_module(empty_init=True):
        net = Layers()
    assert all(parameter.is_meta for parameter in net.parameters())
    made.setup_module(net)
    return values(net)


@pytest.mark.parametrize("row", ["ddp", "fsdp"])
def test_fabric_with_a_model_on_the_meta_device_and_an_init_function(ranks2: Ranks, row: str) -> None:
    for result in ranks2.run(fabric_on_meta, row):
        assert {element for value in result.values() for element in value.flatten().tolist()} == {0.5}


@pytest.mark.parametrize("kind", [AccelFSDPStrategy, fabric.AccelFSDPStrategy], ids=["trainer", "fabric"])
def test_mistakes_are_refused_at_once(kind: Any) -> None:
    with pytest.raises(ValueError, match="Expected sharding to be one of 'full', 'partial', 'hybrid', got 'half'"):
        kind(sharding="half")
    with pytest.raises(ValueError, match="Expected shard_size with sharding='hybrid' only, got 2 with 'full'"):
        kind(shard_size=2)
    with pytest.raises(ValueError, match="Expected offload to be 'optimizer', 'parameters' or None, got 'moon'"):
        kind(offload="moon")
    with pytest.raises(TypeError, match="Did you mean 'shard_size'"):
        kind(shards_size=2)


def test_hybrid_is_registered() -> None:
    for suffix in ("", "_spawn", "_fork", "_notebook"):
        assert StrategyRegistry.get(f"accel_fsdp_hybrid{suffix}").row.hybrid


def stop_and_continue_on_meta(strategy: Any, path: Path) -> tuple[dict[str, Tensor], float, float]:
    """Two epochs, then two more of a new model on the meta device; and the losses of test before and after loading."""
    torch.set_default_dtype(torch.float64)
    try:
        made = make_for(strategy, max_epochs=2)
        torch.manual_seed(11)
        made.fit(module := Late(empty=strategy is not None), loader())
        made.save_checkpoint(path)
        tested = made.test(module, loader(), verbose=False)[0]["test_loss"]
        torch.manual_seed(99)  # values that must not survive
        evaluated = make_for(strategy).test(Late(empty=strategy is not None), loader(), ckpt_path=path, verbose=False)[
            0
        ]["test_loss"]
        make_for(strategy, max_epochs=4).fit(again := Late(empty=strategy is not None), loader(), ckpt_path=path)
    finally:
        torch.set_default_dtype(torch.float32)
    return values(again), tested, evaluated


def make_for(strategy: Any, **arguments: Any) -> Any:
    if strategy is None:
        return alone(**arguments)
    kind = AccelDDPStrategy() if strategy == "ddp" else AccelFSDPStrategy(**strategy)
    return trainer(kind, devices=dist.get_world_size(), **arguments)


@pytest.mark.parametrize("strategy", ["ddp", {}, SETTINGS["hybrid"]], ids=["ddp", "full", "hybrid"])
def test_checkpoints_load_into_models_on_the_meta_device(ranks4: Ranks, strategy: Any, tmp_path: Path) -> None:
    expected, _, _ = stop_and_continue_on_meta(None, tmp_path / "alone.ckpt")
    for result, tested, evaluated in ranks4.run(stop_and_continue_on_meta, strategy, tmp_path / "two.ckpt"):
        assert_close(result, expected)
        assert evaluated == pytest.approx(tested, rel=1e-12)


def load_what_does_not_fit(path: Path) -> None:
    made = trainer(AccelFSDPStrategy(), devices=dist.get_world_size())
    module = Late(empty=True)
    if dist.get_rank() == 0:
        torch.save({"state_dict": {"net.9.weight": torch.ones(1)}, "pytorch-lightning_version": "2.6.0"}, path)
    dist.barrier()
    made.test(module, loader(), ckpt_path=path, verbose=False, weights_only=True)


def test_a_checkpoint_that_does_not_fit_a_model_on_the_meta_device(ranks4: Ranks, tmp_path: Path) -> None:
    for error in ranks4.run_expecting_error(load_what_does_not_fit, tmp_path / "other.ckpt"):
        assert error is not None
        assert "Missing key(s)" in error[1]
        assert "Unexpected key(s)" in error[1]
