"""Factors of gradients wait for the step, and are there whenever somebody looks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.toys import Net, build, data, mse, my_share, relative_error, values
from harness import Ranks
from lightning_accel.core import Engine, GradScaler
from rows import everyday

SHARDED = ["zero1", "zero2", "fsdp", "fsdp_partial"]
CLIP = 0.05
SCALE = 1000.0  # no power of two, so that scaling itself rounds
# Single precision rounds by 6e-8 an operation; 20 steps of correct runs that take sums in another order stay near 1e-6.
SINGLE = 1e-5
EXACT = 1e-12

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "not fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "groups": lambda p: torch.optim.AdamW([{"params": [q]} for q in p], lr=0.01, fused=True),
}
OTHERS = [name for name in OPTIMIZERS if name != "adamw"]


class Passes(TorchDispatchMode):
    """Notes the operations that have a large tensor among their arguments, but for those that make views."""

    VIEWS = ("slice", "split", "detach", "as_strided", "view")

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found: list[Tensor] = []
        torch.utils._pytree.tree_map_only(Tensor, found.append, (args, kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        if any(tensor.numel() >= self.elements for tensor in found) and name not in self.VIEWS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def passes(row: str, offload: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What touches gradients from ``unscale_`` until after the step, and what a step alone does."""
    module = build(lambda: nn.Linear(64, 64, bias=False), torch.float32)
    engine = Engine(module, row, **offload)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    engine.add_optimizer(optimizer)
    scaler = GradScaler()
    seen = []
    for clips in (True, True, False):
        optimizer.zero_grad()
        engine.backward(scaler.scale(module(torch.ones(1, 64)).square().sum()))
        with Passes(64 * 64 // dist.get_world_size()) as noted:
            if clips:
                scaler.unscale_(optimizer)
                engine.grad_norm(optimizer)
                engine.clip_grad_norm_(optimizer, CLIP)
            scaler.step(optimizer)
        scaler.update()
        seen.append(noted.seen)
    return seen[1], seen[2]


@pytest.mark.parametrize("row", everyday(["zero1", "zero2", "fsdp_partial"]))
def test_unscaling_checking_and_clipping_read_once_and_write_never(ranks2: Ranks, row: str) -> None:
    for clipped, plain in ranks2.run(passes, row, {}):
        assert clipped == plain == ["linalg_vector_norm", "_fused_adamw_"]


def loop(engine: Engine | None, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """20 steps with clipping, every second one of which is small enough to need none; with an engine, scaled, too."""
    scaler = GradScaler("static", init_scale=SCALE)
    xs, ys = data(20, dist.get_world_size(), next(module.parameters()).dtype)
    for step, (x, y) in enumerate(zip(xs, ys, strict=True)):
        limit = 1e6 if step % 2 else CLIP
        optimizer.zero_grad()
        if engine is None:
            mse(module, x, y).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), limit)
            optimizer.step()
            continue
        with engine.forward_context():
            loss = mse(module, my_share(x), my_share(y))
        engine.backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        engine.clip_grad_norm_(optimizer, limit)
        scaler.step(optimizer)
        scaler.update()


def errors(row: str, optimizer: str, dtypes: list[torch.dtype], **options: Any) -> list[float]:
    found = []
    for dtype in dtypes:
        alone, module = build(Net, dtype), build(Net, dtype)
        start = [p.detach().clone() for p in alone.parameters()]
        loop(None, alone, OPTIMIZERS[optimizer](list(alone.parameters())))
        assert relative_error(alone.parameters(), start) > 1e-2, "training changed nothing: the comparison is void"
        engine = Engine(module, row, **options)
        made = OPTIMIZERS[optimizer](list(module.parameters()))
        engine.add_optimizer(made)
        loop(engine, module, made)
        found.append(relative_error(values(engine), alone.parameters()))
        engine.close()
    return found


@pytest.mark.parametrize("optimizer", ["adamw", *(pytest.param(o, marks=pytest.mark.matrix) for o in OTHERS)])
@pytest.mark.parametrize("row", everyday(SHARDED))
def test_steps_with_factors_equal_a_single_process(ranks2: Ranks, row: str, optimizer: str) -> None:
    for single, double in ranks2.run(errors, row, optimizer, [torch.float32, torch.float64]):
        assert single < SINGLE
        assert double < EXACT


@pytest.mark.parametrize("options", [{"offload": "optimizer"}, {"units": ["blocks.1"]}], ids=["offload", "units"])
def test_with_other_settings(ranks2: Ranks, options: dict[str, Any]) -> None:
    for found in ranks2.run(errors, "zero2", "adamw", [torch.float32], **options):
        assert found[0] < SINGLE


def looked_at(row: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """What gradients of ones are to those who look or add after clipping to half their norm."""
    module = build(lambda: nn.Linear(4, 1, bias=False), dtype)
    engine = Engine(module, row)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, fused=True)
    added = engine.add_optimizer(optimizer)
    x = torch.ones(1, 4, dtype=dtype)
    torch.set_default_dtype(torch.float64 if dtype is torch.float32 else torch.bfloat16)  # says nothing of gradients
    found: dict[str, list[float]] = {}

    def full() -> list[float]:
        gradient = engine.full_gradient(module.weight)
        assert gradient is not None
        return gradient.flatten().tolist()

    def clipped() -> None:
        optimizer.zero_grad()
        engine.backward(module(x).sum())
        engine.clip_grad_norm_(optimizer, 1.0)  # of 2

    clipped()
    found["full"] = full()
    found["norm"] = [float(engine.grad_norm(optimizer)), float(engine.grad_norm(optimizer, 1.0))]
    found["again"] = [float(engine.clip_grad_norm_(optimizer, 0.5)), *full()]
    found["tensors"] = [float(t) for tensor in added.gradients.tensors() for t in tensor]
    engine.clip_grad_value_(optimizer, 0.1)
    found["value"] = full()
    clipped()
    engine.backward(module(x).sum())
    found["more"] = full()
    clipped()
    module.weight.grad = torch.full((1, 4), 3.0, dtype=dtype)
    found["assigned"] = full()
    clipped()
    module.weight.grad.zero_()
    found["zeroed"] = [float(engine.grad_norm(optimizer)), *full()]
    clipped()
    before = values(engine)[0]
    optimizer.step()
    found["step"] = (before - values(engine)[0]).flatten().tolist()
    found["after"] = [*full(), float(engine.grad_norm(optimizer))]
    clipped()
    seen: list[float] = []

    def look(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for group in stepped.param_groups:
            for segment in group["params"]:
                seen.extend(segment.grad.flatten().tolist())
                segment.grad.clamp_(max=0.25)

    before, handle = values(engine)[0], optimizer.register_step_pre_hook(look)
    optimizer.step()
    handle.remove()
    found["hook"] = seen
    found["clamped"] = (before - values(engine)[0]).flatten().tolist()
    engine.close()
    return found


@pytest.mark.parametrize("row", everyday(["ddp", *SHARDED]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_who_looks_finds_the_product(ranks2: Ranks, row: str, dtype: torch.dtype) -> None:
    # clip_grad_norm_ divides by the norm plus 1e-6.
    half = pytest.approx([0.5] * 4, rel=1e-6)
    for found in ranks2.run(looked_at, row, dtype):
        assert found["full"] == half
        assert found["norm"] == pytest.approx([1.0, 2.0], rel=1e-6)
        assert found["again"] == pytest.approx([1.0, *[0.25] * 4], rel=1e-5)
        assert all(value == pytest.approx(0.25, rel=1e-5) for value in found["tensors"])
        assert found["value"] == pytest.approx([0.1] * 4, rel=1e-7)
        assert found["more"] == pytest.approx([1.5] * 4, rel=1e-6)
        assert found["assigned"] == [3.0] * 4
        assert found["zeroed"] == [0.0] * 5
        assert found["step"] == half
        assert found["after"] == pytest.approx([*[0.5] * 4, 1.0], rel=1e-6)
        assert all(value == pytest.approx(0.5, rel=1e-6) for value in found["hook"])
        assert found["clamped"] == pytest.approx([0.25] * 4, rel=1e-6)
