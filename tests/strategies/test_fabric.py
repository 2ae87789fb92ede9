"""What a Fabric user expects of a strategy, under each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from models import FEATURES, FLOAT64, OUTPUTS, ROWS, Net, Samples, arrive_late, assert_close, loader, values
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness import Ranks
from opened import opened, size_of
from rows import everyday


def fabric_for(strategy: str, **arguments: Any) -> Fabric:
    """A launched Fabric for a row in a rank, or for "auto" in pytest's process."""
    alone = strategy == "auto"
    name = strategy if alone else f"accel_{strategy}"
    fabric = Fabric(accelerator="cpu", devices=1 if alone else 2, strategy=name, **arguments)
    fabric.launch()
    return fabric


def new_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)


# ---------------------------------------------------------------------- loops


def train(
    strategy: str, accumulate: int = 1, clip: dict[str, float] | None = None, separately: bool = False, epochs: int = 2
) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters after a loop as Fabric's documentation has it, and what clipping returned."""
    fabric = fabric_for(strategy)
    net = Net()
    if separately:
        model = fabric.setup_module(net)
        optimizer = fabric.setup_optimizers(new_optimizer(net))
    else:
        model, optimizer = fabric.setup(net, new_optimizer(net))
    norms = []
    for _ in range(epochs):
        for step, (_, x, y) in enumerate(loader()):
            boundary = (step + 1) % accumulate == 0
            with fabric.no_backward_sync(model, enabled=not boundary):
                fabric.backward(nn.functional.mse_loss(model(x), y) / accumulate)
            if not boundary:
                continue
            if clip:
                norm = fabric.clip_gradients(model, optimizer, **clip)
                norms += [] if norm is None else [norm.item()]
            optimizer.step()
            optimizer.zero_grad()
    return values(net), norms


@pytest.mark.parametrize(
    "clip", [None, {"max_norm": 0.2}, {"max_norm": 0.3, "norm_type": float("inf")}, {"clip_val": 0.05}]
)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_loop_equals_a_single_process(ranks2: Ranks, row: str, accumulate: int, clip: dict[str, float] | None) -> None:
    expected, expected_norms = train("auto", accumulate, clip)
    for result, norms in ranks2.run(train, row, accumulate, clip):
        assert_close(result, expected)
        assert norms == pytest.approx(expected_norms, rel=FLOAT64)
    assert len(expected_norms) == (8 // accumulate if clip and "max_norm" in clip else 0)


@pytest.mark.parametrize("row", everyday(ROWS))
def test_module_and_optimizers_set_up_separately(ranks2: Ranks, row: str) -> None:
    expected, _ = train("auto")
    for result, _ in ranks2.run(train, row, separately=True):
        assert_close(result, expected)


def train_two(strategy: str, together: bool) -> dict[str, Tensor]:
    """Two models, one on top of the other, each with an optimizer of its own; clipped apart."""
    fabric = fabric_for(strategy)
    first = Net(seed=1)
    second = nn.Sequential(nn.Linear(OUTPUTS, 4), nn.Tanh(), nn.Linear(4, OUTPUTS)).double()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    optimizers = [new_optimizer(first), torch.optim.SGD(second.parameters(), lr=0.05, momentum=0.9)]
    if together:
        model_1, optimizer_1 = fabric.setup(first, optimizers[0])
        model_2, optimizer_2 = fabric.setup(second, optimizers[1])
    else:
        model_1, model_2 = fabric.setup_module(first), fabric.setup_module(second)
        optimizer_2, optimizer_1 = fabric.setup_optimizers(optimizers[1], optimizers[0])
    for step, (_, x, y) in enumerate(loader()):
        fabric.backward(nn.functional.mse_loss(model_2(model_1(x)), y))
        fabric.clip_gradients(model_2, optimizer_2, max_norm=0.1)
        optimizer_2.step()
        optimizer_2.zero_grad()
        if step % 2:  # the first model's gradients add up over two batches
            optimizer_1.step()
            optimizer_1.zero_grad()
    return {f"first.{name}": value for name, value in values(first).items()} | {
        f"second.{name}": value for name, value in values(second).items()
    }


@pytest.mark.parametrize("together", [True, False], ids=["setup", "setup_module"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_two_models(ranks2: Ranks, row: str, together: bool) -> None:
    expected = train_two("auto", together)
    for result in ranks2.run(train_two, row, together):
        assert_close(result, expected)


def train_compiled(row: str, backend: str) -> dict[str, Tensor]:
    fabric = fabric_for(row)
    net = Net()
    model, optimizer = fabric.setup(torch.compile(net, backend=backend), new_optimizer(net))
    arrive_late(fabric.strategy.engines[0])
    for _ in range(2):
        for _, x, y in loader():
            fabric.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    fabric.strategy.engines[0].wait()
    return values(net)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_compiled_model(ranks2: Ranks, row: str, backend: str) -> None:
    expected, _ = train("auto")
    for result in ranks2.run(train_compiled, row, backend):
        assert_close(result, expected)


def sampled(row: str) -> list[int]:
    fabric = fabric_for(row)
    batches = fabric.setup_dataloaders(DataLoader(Samples(), batch_size=4, shuffle=True))
    return [index for indices, _, _ in batches for index in indices.tolist()]


@pytest.mark.parametrize("row", everyday(ROWS))
def test_dataloaders_are_divided_between_ranks(ranks2: Ranks, row: str) -> None:
    mine, theirs = ranks2.run(sampled, row)
    assert sorted(mine + theirs) == list(range(32))
    assert sorted(mine) != mine


def train_with_two_optimizers(strategy: str) -> tuple[dict[str, Tensor], list[float]]:
    """Two optimizers of one model that step in turn, one with a learning rate schedule; evaluation in between."""
    fabric = fabric_for(strategy)
    net = Net()
    sgd = torch.optim.SGD([*net.first.parameters(), *net.last.parameters()], lr=0.1, momentum=0.9)
    adam = torch.optim.Adam(net.blocks.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.StepLR(adam, step_size=2, gamma=0.5)
    model, sgd, adam, schedule = fabric.setup(net, sgd, adam, scheduler=schedule)
    if strategy != "auto":
        arrive_late(fabric.strategy.engines[0])
    losses = []
    for step, (_, x, y) in enumerate(loader(size=48)):
        fabric.backward(nn.functional.mse_loss(model(x), y))
        (sgd if step % 2 else adam).step()
        for optimizer in (sgd, adam):
            optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            losses.append(fabric.all_reduce(nn.functional.mse_loss(model(x), y)).item())
    return values(net), losses


@pytest.mark.parametrize("row", everyday(ROWS))
def test_two_optimizers_and_a_scheduler(ranks2: Ranks, row: str) -> None:
    expected, expected_losses = train_with_two_optimizers("auto")
    for result, losses in ranks2.run(train_with_two_optimizers, row):
        assert_close(result, expected)
        assert losses == pytest.approx(expected_losses, rel=FLOAT64)


def clip_in(row: str, precision: str) -> list[float]:
    """The norm before clipping and the norm after."""
    fabric = fabric_for(row, precision=precision)
    net = Net(dtype=torch.float32)
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), fused=True))
    _, x, y = next(iter(loader(dtype=torch.float32)))
    fabric.backward(nn.functional.mse_loss(model(x), y))
    norms = [fabric.clip_gradients(model, optimizer, max_norm=limit).item() for limit in (0.02, 1e9)]
    optimizer.step()
    return norms


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_clipping_with_every_precision(ranks2: Ranks, row: str, precision: str) -> None:
    # As for the Trainer: four roundings to bfloat16; otherwise the 1e-6 that torch adds to the norm.
    tolerance = 4 * 2**-9 if precision == "bf16-true" else 1e-4
    for before, after in ranks2.run(clip_in, row, precision):
        assert before > 0.04
        assert after == pytest.approx(0.02, rel=tolerance)


# ---------------------------------------------------------------------- checkpoints


def train_and_save(strategy: str, path: Path, batches: int) -> None:
    fabric = fabric_for(strategy)
    net = Net()
    model, optimizer = fabric.setup(net, new_optimizer(net))
    run(fabric, model, optimizer, range(batches))
    fabric.save(path, {"model": model, "optimizer": optimizer, "batches": batches})


def load_and_train(strategy: str, path: Path, batches: int) -> dict[str, Tensor]:
    fabric = fabric_for(strategy)
    net = Net(seed=5)
    model, optimizer = fabric.setup(net, new_optimizer(net))
    state = {"model": model, "optimizer": optimizer, "batches": 0}
    assert fabric.load(path, state) == {}
    run(fabric, model, optimizer, range(state["batches"], batches))
    return values(net)


def run(fabric: Fabric, model: nn.Module, optimizer: Any, batches: range) -> None:
    samples = list(loader())
    for batch in batches:
        _, x, y = samples[batch % len(samples)]
        fabric.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("before", "after"),
    [*[(row, row) for row in ROWS], ("zero2", "auto"), ("auto", "zero2"), ("zero1", "ddp"), ("ddp", "zero1")],
)
def test_save_and_load(ranks2: Ranks, before: str, after: str, tmp_path: Path) -> None:
    path = tmp_path / "state.ckpt"
    if before == "auto":
        train_and_save(before, path, 3)
    else:
        ranks2.run(train_and_save, before, path, 3)
    train_and_save("auto", tmp_path / "all.ckpt", 7)
    expected = opened(tmp_path / "all.ckpt")["model"]
    results = [load_and_train(after, path, 7)] if after == "auto" else ranks2.run(load_and_train, after, path, 7)
    for result in results:
        assert_close(result, expected)


def load_raw(row: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    fabric = fabric_for(row)
    net = Net(seed=5)
    model, optimizer = fabric.setup(net, new_optimizer(net))
    fabric.load_raw(path.with_suffix(".net"), model)
    fabric.load_raw(path.with_suffix(".opt"), optimizer)
    return values(net), optimizer.state_dict()


@pytest.mark.parametrize("row", everyday(ROWS))
def test_load_raw(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    train_and_save("auto", tmp_path / "state.ckpt", 3)
    saved = opened(tmp_path / "state.ckpt")
    torch.save(saved["model"], tmp_path / "state.net")
    torch.save(saved["optimizer"], tmp_path / "state.opt")
    results = ranks2.run(load_raw, row, tmp_path / "state.ckpt")
    for parameters, _ in results:
        assert_close(parameters, saved["model"], tolerance=0)
    _, state = results[0]  # whole on rank 0
    for index, entry in saved["optimizer"]["state"].items():
        assert_close(state["state"][index], entry, tolerance=0)


class Wide(nn.Module):
    """One small layer beside two large ones, in one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.ModuleList(nn.Linear(300, 300, bias=False) for _ in range(2))
        self.small = nn.Linear(4, 4)


def save_filtered(row: str, folder: Path) -> None:
    fabric = fabric_for(row)
    net = Wide()
    model, optimizer = fabric.setup(net, new_optimizer(net))
    state = {"model": model, "optimizer": optimizer, "step": 1}
    fabric.save(folder / "all.ckpt", state)
    fabric.save(folder / "small.ckpt", state, filter={"model": lambda name, _: name.startswith("small")})
    fabric.save(folder / "one.ckpt", {"model": model}, filter={"model": lambda name, _: name == "large.1.weight"})


@pytest.mark.parametrize("row", everyday(ROWS))
def test_filtered_save_writes_only_what_passes(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    ranks2.run(save_filtered, row, tmp_path)
    saved = {name: opened(tmp_path / f"{name}.ckpt") for name in ("all", "small", "one")}
    assert saved["small"]["model"].keys() == {"small.weight", "small.bias"}
    assert saved["one"]["model"].keys() == {"large.1.weight"}
    for name in ("small", "one"):
        for key, value in saved[name]["model"].items():
            assert torch.equal(value, saved["all"]["model"][key])
    matrix = 300 * 300 * 4
    sizes = {name: size_of(tmp_path / f"{name}.ckpt") for name in saved}
    # A chunk takes torch.save and its metadata 1.8 KiB more than its values; a tensor is one or a few on each rank.
    assert sizes["small"] < 10_000
    assert matrix < sizes["one"] < matrix + 10_000
    assert 2 * matrix < sizes["all"] < 2 * matrix + 40_000


# ---------------------------------------------------------------------- errors


def call_loss_backward(row: str, through_model: bool) -> None:
    fabric = fabric_for(row)
    net = Net()
    model, _ = fabric.setup(net, new_optimizer(net))
    _, x, y = next(iter(loader()))
    nn.functional.mse_loss(model(x) if through_model else net(x), y).backward()


@pytest.mark.parametrize("row", everyday(ROWS))
def test_loss_backward_says_to_call_fabric_backward(ranks2: Ranks, row: str) -> None:
    for through_model in (True, False):  # Lightning's own check looks at the outputs of the wrapped model only
        for error in ranks2.run_expecting_error(call_loss_backward, row, through_model):
            assert error is not None
            assert error[0] == "RuntimeError"
            assert "fabric.backward(loss)" in error[1]


def set_up_a_strangers_optimizer(row: str, beside: bool) -> None:
    fabric = fabric_for(row)
    net, other = Net(), Net()
    if beside:
        fabric.setup(net, new_optimizer(other))
    else:
        fabric.setup_module(net)
        fabric.setup_optimizers(new_optimizer(other))


@pytest.mark.parametrize("beside", [True, False], ids=["setup", "setup_optimizers"])
def test_optimizer_of_another_model_is_refused(ranks2: Ranks, beside: bool) -> None:
    for error in ranks2.run_expecting_error(set_up_a_strangers_optimizer, "zero2", beside):
        assert error is not None
        # Lightning's own check comes first in `setup` and is as clear.
        assert error[0] in ("ValueError", "RuntimeError")
        assert "AdamW" in error[1] or "optimizer" in error[1]


def teardown_gives_memory_back(row: str) -> bool:
    fabric = fabric_for(row)
    net = Net()
    model, optimizer = fabric.setup(net, new_optimizer(net))
    run(fabric, model, optimizer, range(1))
    before = values(net)
    fabric.strategy.teardown()
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    assert_close(values(net), before, tolerance=0)
    return len(own) == len(list(net.parameters())) and fabric.strategy.engines == []


@pytest.mark.parametrize("row", everyday(ROWS))
def test_teardown_leaves_a_plain_module(ranks2: Ranks, row: str) -> None:
    assert ranks2.run(teardown_gives_memory_back, row) == [True, True]


def state_of_optimizer(row: str) -> dict[str, Any]:
    fabric = fabric_for(row)
    net = nn.Linear(FEATURES, OUTPUTS).double()
    model, optimizer = fabric.setup(net, new_optimizer(net))
    run(fabric, model, optimizer, range(2))
    return optimizer.state_dict()


@pytest.mark.parametrize("row", everyday(ROWS))
def test_optimizer_state_dict_is_whole_on_rank_0(ranks2: Ranks, row: str) -> None:
    first, second = ranks2.run(state_of_optimizer, row)
    assert [tuple(first["state"][index]["exp_avg"].shape) for index in (0, 1)] == [(OUTPUTS, FEATURES), (OUTPUTS,)]
    assert (second == {}) == (row != "ddp")
