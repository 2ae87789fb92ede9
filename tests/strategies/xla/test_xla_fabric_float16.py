"""precision="16-mixed" for Fabric under accel_xla: the scale and the steps that are skipped are those of accel_ddp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from litnet import LitNet, difference, leave_group, litnet, loader
from torch import nn

from lightning_accel.core import GradScaler
from lightning_accel.core.grad_scaler import Surroundings
from lightning_accel.strategies.fabric import AccelDDPStrategy, AccelXLAStrategy

pytestmark = pytest.mark.xla

OVERFLOWS = (1, 5, 6)
STEPS = 10
HALF = 2.0**-9
"""fp16 has 11 bits: products are rounded to 2^-12 of themselves, in another order."""

RULES: dict[str, dict[str, Any]] = {
    "torch": {"growth_interval": 3, "init_scale": 2.0**10},
    "deepspeed": {"rule": "deepspeed", "growth_interval": 2, "init_scale": 2.0**10},
}


def fabric_of(row: str, scaler: GradScaler | None = None, **settings: Any) -> Fabric:
    """On the devices, or for ``"cpu"`` in one process beside them."""
    on_cpu = {"accelerator": "cpu", "devices": 1} if row == "cpu" else {}
    chosen: Any = AccelDDPStrategy if on_cpu else AccelXLAStrategy
    strategy = chosen(grad_scaler=scaler, **settings, **({} if on_cpu else {"sharding": row}))
    fabric = Fabric(strategy=strategy, precision="16-mixed", **on_cpu)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3, eps=1e-5)


def overflowing(loss: Any, index: int) -> Any:
    return loss * float("inf") if index in OVERFLOWS else loss


def train(
    fabric: Fabric,
    model: Any,
    optimizer: Any,
    batches: Any,
    clip: dict[str, Any] | None = None,
    after: Callable[[], Any] = lambda: None,
) -> tuple[list[float], list[float]]:
    """The losses, and the norms that clipping has seen; some losses are infinite where they are scaled."""
    losses, norms = [], []
    for index, (tokens, targets) in enumerate(batches):
        loss = nn.functional.cross_entropy(model(tokens), targets)
        fabric.backward(overflowing(loss, index))
        if clip:
            norm = fabric.clip_gradients(model, optimizer, **clip)
            norms += [] if norm is None or index in OVERFLOWS else [float(norm)]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        after()
    return losses, norms


def ran(row: str, rule: str, clip: dict[str, Any]) -> tuple[LitNet, list[Any], list[float], list[float]]:
    fabric = fabric_of(row, GradScaler(**RULES[rule]))
    net = litnet()
    model, optimizer = fabric.setup(net, adam(net))
    scaler: Any = fabric.strategy.grad_scaler
    seen: list[tuple[float, int]] = []
    losses, norms = train(
        fabric,
        model,
        optimizer,
        fabric.setup_dataloaders(loader(STEPS), use_distributed_sampler=False),
        clip,
        lambda: seen.append((scaler.get_scale(), scaler.skipped_steps)),
    )
    fabric.strategy.teardown()
    leave_group()
    assert type(scaler.surroundings) is Surroundings
    return net, seen, losses, norms


@pytest.mark.parametrize(
    ("row", "rule", "clip"),
    [
        ("fsdp", "torch", {"max_norm": 0.3, "error_if_nonfinite": False}),
        ("zero2", "deepspeed", {"clip_val": 0.01}),
        ("ddp", "torch", {}),
    ],
)
def test_scales_steps_and_clipping_are_those_of_the_ordinary_rows(row: str, rule: str, clip: dict[str, Any]) -> None:
    model, seen, losses, norms = ran(row, rule, clip)
    other, expected, expected_losses, expected_norms = ran("cpu", rule, clip)
    assert seen == expected
    assert seen[-1][1] == len(OVERFLOWS)
    if rule == "torch":
        assert [scale for scale, _ in seen[:2]] == [2.0**10, 2.0**9], "the second step overflows, and halves it"
    assert losses == pytest.approx(expected_losses, rel=HALF)
    assert norms == pytest.approx(expected_norms, rel=4 * HALF)
    assert len(norms) == (STEPS - len(OVERFLOWS) if "max_norm" in clip else 0)
    assert 0 < difference(model, other) < HALF
    assert difference(other, litnet()) > 4 * HALF, "it learns"


def test_a_new_scale_compiles_nothing_and_one_value_is_read_a_step() -> None:
    from torch_xla.debug import metrics

    scaler = GradScaler(growth_interval=2, init_scale=4.0)
    fabric = fabric_of("fsdp", scaler)
    net = litnet()
    model: Any
    model, optimizer = fabric.setup(net, adam(net))
    (engine,) = fabric.strategy.engines
    compiled, read, scales = [], [], set()
    for tokens, targets in fabric.setup_dataloaders(loader(10)):
        fabric.backward(nn.functional.cross_entropy(model(tokens), targets))
        optimizer.step()
        optimizer.zero_grad()
        compiled.append(engine.compilations)
        read.append((metrics.metric_data("TransferFromDeviceTime") or (0,))[0])
        scales.add(scaler.get_scale())
    assert len(scales) > 4
    assert len(set(compiled[5:])) == 1, compiled
    assert {later - sooner for sooner, later in zip(read[5:], read[6:], strict=False)} == {1}, read
    fabric.strategy.teardown()


def test_the_scale_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def run(start: Path | None, batches: range, **settings: Any) -> tuple[LitNet, float]:
        fabric = fabric_of("zero2", **settings)
        net = litnet()
        model, optimizer = fabric.setup(net, adam(net))
        state = {"model": model, "optimizer": optimizer, "scaler": fabric.strategy.grad_scaler}
        if start is not None:
            assert fabric.load(start, state) == {}
            assert state["scaler"] is fabric.strategy.grad_scaler
        chosen = [batch for index, batch in enumerate(fabric.setup_dataloaders(loader(6))) if index in batches]
        for tokens, targets in chosen:
            fabric.backward(nn.functional.cross_entropy(model(tokens), targets))  # type: ignore[operator]
            optimizer.step()
            optimizer.zero_grad()
        fabric.save(tmp_path / f"{batches.stop}.ckpt", state)
        fabric.strategy.teardown()
        return net, fabric.strategy.grad_scaler.get_scale()

    first: dict[str, Any] = {"scaler": GradScaler(growth_interval=2, init_scale=4.0)}
    assert run(None, range(4), **first)[1] == 16.0
    found, scale = run(tmp_path / "4.ckpt", range(4, 6))  # its own scaler begins at 65536, and grows later
    first["scaler"] = GradScaler(growth_interval=2, init_scale=4.0)
    expected, expected_scale = run(None, range(6), **first)
    assert scale == expected_scale == 32.0
    assert difference(found, expected) < 1e-5
    assert torch.load(tmp_path / "6.ckpt", weights_only=True)["scaler"]["scale"] == 32.0


def test_two_models_have_a_verdict_each() -> None:
    found = []
    for row in ("ddp", "cpu"):
        fabric = fabric_of(row, GradScaler(init_scale=2.0**10))
        nets = litnet(), LitNet()
        nets[1].load_state_dict({name: 0.5 * value for name, value in nets[0].state_dict().items()})
        pairs: list[Any] = [fabric.setup(net, adam(net)) for net in nets]
        for index, (tokens, targets) in enumerate(fabric.setup_dataloaders(loader(3), use_distributed_sampler=False)):
            for number, (model, _) in enumerate(pairs):
                loss = nn.functional.cross_entropy(model(tokens), targets)
                fabric.backward(overflowing(loss, index) if number else loss)
            for model, optimizer in pairs:
                fabric.clip_gradients(model, optimizer, max_norm=0.3, error_if_nonfinite=False)
            for _, optimizer in pairs:
                optimizer.step()
                optimizer.zero_grad()
        scaler: Any = fabric.strategy.grad_scaler
        assert scaler.skipped_steps == 1
        assert scaler.get_scale() == 2.0**9
        fabric.strategy.teardown()
        leave_group()
        found.append(nets)
    for ours, theirs in zip(*found, strict=True):
        assert 0 < difference(ours, theirs) < HALF


def test_activation_checkpointing_computes_in_float16_again() -> None:
    losses = []
    for settings in ({}, {"activation_checkpointing": True}):
        fabric = fabric_of("fsdp", **settings)
        net = litnet()
        model, optimizer = fabric.setup(net, adam(net))
        dtypes = []
        net.blocks[0].up.register_forward_hook(lambda *given, kept=dtypes: kept.append(given[2].dtype))
        losses.append(train(fabric, model, optimizer, fabric.setup_dataloaders(loader(1)))[0])
        assert dtypes == [torch.float16] * (2 if settings else 1)
        fabric.strategy.teardown()
    assert losses[0] == pytest.approx(losses[1], rel=HALF)


def test_a_closure_is_refused() -> None:
    fabric = fabric_of("ddp")
    net = litnet()
    _, optimizer = fabric.setup(net, adam(net))
    with pytest.raises(RuntimeError, match="Expected no closure"):
        optimizer.step(lambda: None)
    fabric.strategy.teardown()
