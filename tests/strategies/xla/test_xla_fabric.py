"""Loops of Fabric under accel_xla on four virtual CPU devices, beside a plain loop of torch on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.accelerators import CPUAccelerator
from litnet import FLOAT32, SAMPLES, Block, LitNet, difference, leave_group, litnet, loader
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_accel.core.placement import ROWS
from lightning_accel.strategies.fabric import AccelXLAStrategy

pytestmark = pytest.mark.xla


def xla(row: str = "fsdp", **settings: Any) -> Fabric:
    strategy = AccelXLAStrategy(row, shard_size=2 if ROWS[row].hybrid else None)
    fabric = Fabric(strategy=strategy, **settings)
    fabric.launch()
    return fabric


def adam(model: nn.Module) -> torch.optim.Optimizer:
    # eps as that of LitNet's own
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3, eps=1e-5)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), targets)


def train(
    fabric: Fabric, model: Any, optimizer: Any, batches: Any, accumulate: int = 1, clip: dict[str, Any] | None = None
) -> list[Tensor]:
    """A loop as Fabric's documentation has it; the losses, where they are."""
    losses = []
    for index, (tokens, targets) in enumerate(batches):
        boundary = (index + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not boundary):
            loss = loss_of(model(tokens), targets)
            fabric.backward(loss / accumulate)
        losses.append(loss.detach())
        if boundary:
            if clip:
                fabric.clip_gradients(model, optimizer, **clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def train_plainly(
    model: LitNet, optimizer: Any, batches: Any, accumulate: int = 1, clip: dict[str, Any] | None = None
) -> list[float]:
    """The same without Fabric."""
    losses = []
    for index, (tokens, targets) in enumerate(batches):
        loss = loss_of(model(tokens), targets)
        (loss / accumulate).backward()
        losses.append(loss.item())
        if (index + 1) % accumulate == 0:
            if clip and "max_norm" in clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip["max_norm"])
            elif clip:
                nn.utils.clip_grad_value_(model.parameters(), clip["clip_val"])
            optimizer.step()
            optimizer.zero_grad()
    return losses


def both(
    row: str, batches: int, precision: Any = None, separately: bool = False, **settings: Any
) -> tuple[LitNet, LitNet]:
    """The same loop under accel_xla and plainly; losses are compared here."""
    fabric = xla(row, precision=precision)
    ours, theirs = litnet(), litnet()
    model: Any
    if separately:
        model = fabric.setup_module(ours)
        optimizer = fabric.setup_optimizers(adam(model))
    else:
        model, optimizer = fabric.setup(ours, adam(ours))
    found = train(fabric, model, optimizer, fabric.setup_dataloaders(loader(batches)), **settings)
    fabric.strategy.teardown()
    expected = train_plainly(theirs, adam(theirs), loader(batches), **settings)
    tolerance = FLOAT32 if precision is None else 2**-6
    assert [float(loss) for loss in found] == pytest.approx(expected, rel=tolerance)
    return ours, theirs


@pytest.mark.parametrize("row", ["ddp", "zero2", "fsdp", "fsdp_hybrid"])
def test_equals_a_plain_loop_with_accumulation_and_clipping(row: str) -> None:
    # Fabric looks whether the norm is finite, if it is not told to leave that
    settings: dict[str, Any] = {"accumulate": 2, "clip": {"max_norm": 0.3, "error_if_nonfinite": row == "fsdp"}}
    ours, theirs = both(row, 40, **settings)
    assert difference(ours, theirs) < FLOAT32
    assert difference(theirs, litnet()) > 1000 * FLOAT32, "it learns"


def test_equals_a_plain_loop_with_clipping_by_value() -> None:
    ours, theirs = both("zero1", 10, separately=True, clip={"clip_val": 0.01})
    assert difference(ours, theirs) < FLOAT32


def test_bf16_mixed_is_within_its_rounding() -> None:
    ours, _ = both("fsdp", 10, precision="bf16-mixed", clip={"max_norm": 0.3})
    assert ours.scale.dtype is torch.float32


def test_bf16_true() -> None:
    ours, _ = both("zero2", 5, precision="bf16-true")
    assert ours.head.weight.dtype is torch.bfloat16


@pytest.mark.parametrize(("row", "which"), [("zero2", True), ("fsdp", [Block]), ("fsdp", ["blocks.0", "head"])])
def test_activation_checkpointing_equals_a_plain_loop(row: str, which: Any) -> None:
    fabric = Fabric(strategy=AccelXLAStrategy(row, activation_checkpointing=which))
    fabric.launch()
    ours, theirs = litnet(), litnet()
    calls = []
    ours.blocks[0].up.register_forward_hook(lambda *_: calls.append(1))
    model, optimizer = fabric.setup(ours, adam(ours))
    settings: dict[str, Any] = {"accumulate": 2, "clip": {"max_norm": 0.3, "error_if_nonfinite": False}}
    found = train(fabric, model, optimizer, fabric.setup_dataloaders(loader(8)), **settings)
    with torch.no_grad():
        model(next(iter(fabric.setup_dataloaders(loader(1))))[0])
    assert len(calls) == 2 * 8 + 1, "twice for each batch, and once without gradients"
    fabric.strategy.teardown()
    assert "forward" not in vars(ours.blocks[0])
    expected = train_plainly(theirs, adam(theirs), loader(8), **settings)
    assert [float(loss) for loss in found] == pytest.approx(expected, rel=FLOAT32)
    assert difference(ours, theirs) < FLOAT32


def test_what_a_fabric_says_of_itself() -> None:
    for settings in ({"strategy": "accel_xla"}, {"accelerator": "accel_xla"}, {"strategy": AccelXLAStrategy("ddp")}):
        fabric = Fabric(**settings)
        assert isinstance(fabric.strategy, AccelXLAStrategy)
        assert fabric.accelerator.name() == "accel_xla"
        assert fabric.launch(lambda fabric, number: number + 1, 1) == 2
        assert (fabric.world_size, fabric.global_rank, fabric.local_rank, fabric.node_rank) == (1, 0, 0, 0)
        assert fabric.is_global_zero
        assert fabric.device.type == "xla"
        one = torch.tensor([1.0, 2.0])
        assert torch.equal(fabric.all_gather(one).cpu(), one)
        assert torch.equal(fabric.all_reduce(one, reduce_op="sum").cpu(), one)
        assert fabric.all_reduce(torch.tensor(3)).is_floating_point(), "the mean of integers"
        assert fabric.broadcast("told") == "told"
        fabric.barrier()


def test_state_rests_as_the_row_says_and_comes_home() -> None:
    """Optimizers are made before the model has moved, one of them with state."""
    found = {}
    for row in ("ddp", "fsdp"):
        fabric = xla(row)
        model, expected = litnet(), litnet()
        optimizer, other = adam(model), adam(expected)
        for module, used in ((model, optimizer), (expected, other)):
            train_plainly(module, used, loader(1))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        wrapped, wrapped_optimizer, schedule = fabric.setup(model, optimizer, scheduler=schedule)
        train(fabric, wrapped, wrapped_optimizer, fabric.setup_dataloaders(loader(2)))
        schedule.step()
        (engine,) = fabric.strategy.engines
        found[row] = engine.report().at_rest
        fabric.strategy.teardown()
        train_plainly(expected, other, loader(2))
        assert difference(model, expected) < FLOAT32
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.9 * 3e-3)
        assert set(optimizer.state) <= set(model.parameters())
        assert model.head.weight is model.embed.weight
        assert model.device == torch.device("cpu")
        assert fabric.strategy.engines == []
        assert not model._load_state_dict_post_hooks
    for kind in ("parameters", "optimizer_state"):
        assert found["ddp"][kind] <= 4 * found["fsdp"][kind] < 1.15 * found["ddp"][kind]


def test_nothing_is_compiled_once_it_is_warm() -> None:
    from torch_xla.debug import metrics

    fabric = xla("fsdp")
    model: Any
    net = litnet()
    model, optimizer = fabric.setup(net, adam(net))
    batches, others = fabric.setup_dataloaders(loader(6), loader(3, seed=2))
    compiled, read = [], []
    for _ in range(3):
        clip = {"max_norm": 0.3, "error_if_nonfinite": False}
        train(fabric, model, optimizer, batches, accumulate=2, clip=clip)
        read.append((metrics.metric_data("TransferFromDeviceTime") or (0,))[0])
        total = torch.zeros((), device=fabric.device)
        with torch.no_grad():
            for tokens, targets in others:
                total += loss_of(model(tokens), targets)
        compiled.append(fabric.strategy.engines[0].compilations)
    assert compiled[1] == compiled[2], compiled
    assert len(set(read)) == 1, read  # nothing waited for a value
    assert total.item() > 0
    fabric.strategy.teardown()


def test_evaluation_equals_the_cpu() -> None:
    fabric = xla("fsdp")
    ours, theirs = litnet(), litnet().eval()
    model = fabric.setup(ours).eval()
    with torch.no_grad():
        for (tokens, _), (plain, _) in zip(fabric.setup_dataloaders(loader(2)), loader(2), strict=True):
            assert torch.allclose(model(tokens).cpu(), theirs(plain), rtol=1e-4, atol=1e-5)


def test_batches_are_cut_over_the_devices() -> None:
    fabric = xla("ddp")
    batch = {"tokens": torch.zeros(8, 5), "targets": torch.zeros(8), "rate": torch.tensor(0.5), "name": "a"}
    given = DataLoader([batch], batch_size=None, collate_fn=lambda same: same)
    ready = fabric.setup_dataloaders(given)
    assert len(ready) == 1
    (found,) = ready
    import torch_xla

    for name in ("tokens", "targets"):
        assert "devices=[4" in torch_xla._XLAC._get_xla_sharding_spec(found[name]), name
    assert found["rate"].device.type == "xla"
    assert found["name"] == "a"
    plain = fabric.setup_dataloaders(loader(2), use_distributed_sampler=True)
    assert [tuple(tokens.shape) for tokens, _ in plain] == [(SAMPLES, 5)] * 2, "the global batch"


class Positioned(DataLoader):
    """Knows where it is, as loaders that can go on do."""

    position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def test_a_loader_that_has_a_state(tmp_path: Path) -> None:
    fabric = xla()
    given = Positioned(loader(1).dataset, batch_size=4)
    ready = fabric.setup_dataloaders(given)
    assert ready.batch_size == 4
    given.position = 3
    fabric.save(tmp_path / "loader.ckpt", {"loader": ready})
    given.position = 0
    assert fabric.load(tmp_path / "loader.ckpt", {"loader": ready}) == {}
    assert given.position == 3


def test_two_models_of_which_one_accumulates() -> None:
    def step(fabric: Fabric, first: Any, second: Any, optimizers: Sequence[Any], batches: Any) -> None:
        for index, (tokens, targets) in enumerate(batches):
            with fabric.no_backward_sync(second, enabled=index % 2 == 0):
                fabric.backward(loss_of(first(tokens) + second(tokens), targets))
            for optimizer in optimizers if index % 2 else optimizers[:1]:
                optimizer.step()
                optimizer.zero_grad()

    found = []
    for fabric in (xla("zero2"), Fabric(accelerator="cpu", devices=1)):
        nets = litnet(), LitNet()
        nets[1].load_state_dict({name: 0.5 * value for name, value in nets[0].state_dict().items()})
        pairs = [fabric.setup(net, adam(net)) for net in nets]
        step(fabric, pairs[0][0], pairs[1][0], [pair[1] for pair in pairs], fabric.setup_dataloaders(loader(4)))
        fabric.strategy.teardown()
        found.append(nets)
    for ours, theirs in zip(*found, strict=True):
        assert difference(ours, theirs) < FLOAT32


# ---------------------------------------------------------------------- checkpoints


def fabric_of(name: str) -> Fabric:
    if name in ROWS:
        return xla(name)
    fabric = Fabric(strategy=name, accelerator="cpu", devices=1)
    fabric.launch()
    return fabric


def run(name: str, folder: Path, start: Path | None, batches: range) -> tuple[LitNet, Path]:
    """Some of six batches, from a checkpoint and to one."""
    fabric = fabric_of(name)
    net = litnet()
    model, optimizer = fabric.setup(net, adam(net))
    state = {"model": model, "optimizer": optimizer, "done": 0, "loss": torch.zeros(())}
    if start is not None:
        assert fabric.load(start, state) == {}
        assert state["done"] == batches.start
    chosen = [batch for index, batch in enumerate(fabric.setup_dataloaders(loader(6))) if index in batches]
    state["loss"] = train(fabric, model, optimizer, chosen)[-1]
    state["done"] = batches.stop
    path = folder / f"{name}-{batches.start}.ckpt"
    fabric.save(path, state)
    fabric.strategy.teardown()
    leave_group()
    return net, path


@pytest.mark.parametrize(
    ("before", "after"), [("zero2", "zero2"), ("fsdp", "auto"), ("auto", "fsdp"), ("fsdp", "accel_zero2")]
)
def test_save_and_load(before: str, after: str, tmp_path: Path) -> None:
    expected, _ = run("auto", tmp_path, None, range(6))
    _, path = run(before, tmp_path, None, range(3))
    found, _ = run(after, tmp_path, path, range(3, 6))
    assert difference(found, expected) < FLOAT32


def test_loads_a_directory_of_another_row(tmp_path: Path) -> None:
    expected, _ = run("auto", tmp_path, None, range(6))
    _, path = run("accel_zero2", tmp_path, None, range(3))
    assert path.is_dir()
    found, _ = run("ddp", tmp_path, path, range(3, 6))
    assert difference(found, expected) < FLOAT32


def test_a_checkpoint_is_whole_and_in_host_memory(tmp_path: Path) -> None:
    net, path = run("fsdp", tmp_path, None, range(2))
    found = torch.load(path, weights_only=True)
    assert {leaf.device.type for leaf in tree_leaves(found) if isinstance(leaf, Tensor)} == {"cpu"}
    again = litnet()
    again.load_state_dict(found["model"])
    assert difference(again, net) == 0
    adam(again).load_state_dict(found["optimizer"])


def test_load_raw_filters_and_what_else_writes_values(tmp_path: Path) -> None:
    other, path = run("auto", tmp_path, None, range(2))
    torch.save(other.state_dict(), tmp_path / "raw.pt")
    fabric = xla("fsdp")
    net = litnet()
    model, optimizer = fabric.setup(net, adam(net))
    (engine,) = fabric.strategy.engines
    size = engine.report().at_rest["parameters"]
    fabric.load_raw(tmp_path / "raw.pt", model)
    assert engine.report().at_rest["parameters"] == size
    fabric.save(tmp_path / "one.ckpt", {"model": model}, filter={"model": lambda name, value: name == "scale"})
    assert torch.load(tmp_path / "one.ckpt", weights_only=True) == {"model": {"scale": other.scale}}
    model.load_state_dict(litnet().state_dict())
    assert engine.report().at_rest["parameters"] == size
    assert torch.equal(fabric.strategy.get_module_state_dict(net)["scale"], litnet().scale)
    fabric.load(path, {"optimizer": optimizer}, strict=False)
    assert optimizer.state_dict()["state"][0]["exp_avg"].device.type == "cpu"
    with pytest.raises(ValueError, match=r"Expected the state of an optimizer with \[1\] parameters"):
        fabric.load(path, {"model": model, "optimizer": torch.optim.SGD([net.scale], lr=0.1)}, strict=False)
    assert torch.equal(fabric.strategy.get_module_state_dict(net)["scale"], litnet().scale), "nothing was loaded"
    with pytest.raises(FileNotFoundError):
        fabric.load(tmp_path / "nowhere.ckpt", {"model": model})
    fabric.strategy.teardown()


# ------------------------------------------------------------------------- mistakes


def test_a_batch_that_does_not_divide() -> None:
    fabric = xla()
    with pytest.raises(ValueError, match=r"multiple of the 4 XLA devices, got a tensor of shape \(6, 5\).*drop_last"):
        next(iter(fabric.setup_dataloaders(loader(2, size=6))))


@pytest.mark.parametrize("devices", [3, [0, 1], "2"])
def test_devices_that_do_not_fit(devices: Any) -> None:
    with pytest.raises(ValueError, match="Expected devices to be 'auto' or 4, got .*CPU_NUM_DEVICES"):
        Fabric(strategy="accel_xla", devices=devices)


def test_several_nodes() -> None:
    with pytest.raises(ValueError, match="Expected num_nodes=1 with accel_xla.*got 2"):
        Fabric(strategy="accel_xla", num_nodes=2)


@pytest.mark.parametrize("precision", ["16-true", "64-true"])
def test_other_precisions(precision: Any) -> None:
    with pytest.raises(ValueError, match=f"with accel_xla, got '{precision}'"):
        Fabric(strategy="accel_xla", precision=precision)


def test_models_and_optimizers_that_do_not_fit() -> None:
    fabric = xla()
    net = litnet()
    with pytest.raises(ValueError, match="nowhere"):
        Fabric(strategy=AccelXLAStrategy(units=["nowhere"])).strategy.setup_module(net)
    with pytest.raises(ValueError, match="activation_checkpointing.*elsewhere"):
        Fabric(strategy=AccelXLAStrategy(activation_checkpointing=["elsewhere"])).strategy.setup_module(net)
    with pytest.raises(ValueError, match="to have repeated blocks .* for activation_checkpointing=True, found none"):
        Fabric(strategy=AccelXLAStrategy(activation_checkpointing=True)).strategy.setup_module(nn.Linear(4, 4))
    assert net.head.weight.device.type == "cpu"
    model: Any = fabric.setup_module(net)
    with pytest.raises(ValueError, match="parameters of AdamW to belong to a module that was set up, but none of 1"):
        fabric.setup_optimizers(adam(litnet()))
    with pytest.raises(ValueError, match="without fused=True"):
        fabric.setup_optimizers(torch.optim.AdamW(net.parameters(), fused=True))
    with pytest.raises(ValueError, match="Expected a module in host memory.*strategy.teardown"):
        xla().setup(net)
    with pytest.raises(TypeError, match=r"that fabric.setup returned to fabric.no_backward_sync, got LitNet"):
        xla().no_backward_sync(model)
    tokens, targets = next(iter(fabric.setup_dataloaders(loader(1))))
    with pytest.raises(RuntimeError, match=r"fabric.backward\(loss\)"):
        loss_of(model(tokens), targets).backward()


def test_the_strategy_on_another_accelerator() -> None:
    for accelerator in ("cpu", CPUAccelerator()):
        with pytest.raises(ValueError, match=r"Expected accelerator='accel_xla' with strategy .*Leave the accelerator"):
            Fabric(strategy=AccelXLAStrategy(), accelerator=accelerator)
