"""Activation checkpointing on a virtual mesh of four CPU devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_accel.core.xla import XLAEngine

pytestmark = pytest.mark.xla

WIDTH, BLOCKS, SAMPLES = 12, 3, 8


class Block(nn.Module):
    """Takes its input in a dictionary and a factor by name, and returns several values. One parameter is frozen."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.shift = nn.Parameter(torch.full((WIDTH,), 0.1), requires_grad=False)
        self.calls = 0

    def forward(self, inputs: dict[str, Tensor], *, factor: Tensor) -> tuple[dict[str, Tensor], Tensor, str]:
        self.calls += 1
        inner = self.dropout(torch.tanh(self.up(inputs["x"] + self.shift)))
        return {"x": inputs["x"] + factor * self.down(inner)}, inner.square().mean(), "a value of another kind"


class Net(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(BLOCKS))
        self.factor = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        values, penalty = {"x": x}, torch.zeros((), dtype=x.dtype, device=x.device)
        for block in self.blocks:
            values, more, _ = block(values, factor=self.factor)
            penalty = penalty + more
        return (self.head(values["x"]) - 1).square().mean() + 0.1 * penalty


def net(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(dropout).to(dtype)


def batches(count: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SAMPLES, WIDTH, generator=generator, dtype=dtype) for _ in range(count)]


def trained(
    model: Net, row: str, *, recompute: Any = (), steps: int = 6, autocast: bool = False, clip: bool = False
) -> tuple[list[float], Net, XLAEngine]:
    """Losses, the model at home, and the engine."""
    import torch_xla

    engine = XLAEngine(model, row, shard_size=2 if row == "fsdp_hybrid" else None)
    engine.recompute(recompute)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)
    engine.add_optimizer(optimizer)
    losses = []
    for index, x in enumerate(batches(2 * steps, next(model.parameters()).dtype)):
        is_last = bool(index % 2)
        torch_xla.manual_seed(index)
        x = engine.put_batch(x)
        with torch.autocast("xla", torch.bfloat16, enabled=autocast):
            loss = model(x)
        if is_last:
            engine.backward(loss)
            if clip:
                nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.1)
            optimizer.step()
            optimizer.zero_grad()
        else:
            with engine.no_sync():
                engine.backward(loss)
        losses.append(loss.detach())
    found = [float(loss) for loss in losses]
    engine.bring_home()
    return found, model, engine


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def parts(model: Net, which: str) -> list[nn.Module]:
    return {
        "blocks": [*model.blocks],
        "within": [block.up for block in model.blocks],
        "nested": [*model.blocks, *(block.down for block in model.blocks)],
        "outside": [model.head],
        "all": [model],
    }[which]


@pytest.mark.parametrize(
    ("row", "which"),
    [
        *((row, "blocks") for row in ("ddp", "zero2", "fsdp", "fsdp_hybrid")),
        *(("fsdp", which) for which in ("within", "nested", "outside", "all")),
    ],
)
def test_equals_a_run_without(row: str, which: str) -> None:
    ours, theirs = net(dropout=0.3), net(dropout=0.3)
    again, model, _ = trained(ours, row, recompute=parts(ours, which), clip=True)
    once, other, _ = trained(theirs, row, clip=True)
    assert again == pytest.approx(once, rel=1e-12)
    assert float((flat(model) - flat(other)).norm() / flat(other).norm()) < 1e-12
    assert once[-1] < once[0], "it learns"
    # Random numbers are drawn, so they are the same ones in both computations.
    assert once != pytest.approx(trained(net(), row, clip=True)[0], rel=1e-3)


def test_blocks_are_computed_twice_and_only_in_training() -> None:
    model = net()
    trained(model, "fsdp", recompute=model.blocks, steps=1)
    assert [block.calls for block in model.blocks] == [4] * BLOCKS
    engine = XLAEngine(model, "fsdp")
    engine.recompute(model.blocks)
    x = engine.put_batch(batches(1, torch.float64)[0])
    model.eval()
    model(x).backward()
    with torch.no_grad():
        model.train()(x)
    assert [block.calls for block in model.blocks] == [6] * BLOCKS


@pytest.mark.parametrize("row", ["zero2", "fsdp"])
def test_autocast_is_that_of_forward(row: str) -> None:
    ours, theirs = net(torch.float32), net(torch.float32)
    again, model, _ = trained(ours, row, recompute=ours.blocks, autocast=True)
    once, other, _ = trained(theirs, row, autocast=True)
    assert again == pytest.approx(once, rel=1e-6)
    assert float((flat(model) - flat(other)).norm() / flat(other).norm()) < 1e-6
    assert once != pytest.approx(trained(net(torch.float32), row)[0], rel=1e-6), "it rounds"


def test_nothing_is_compiled_after_the_second_step() -> None:
    model = net(dropout=0.3)
    short = trained(model, "fsdp", recompute=model.blocks, steps=3)[2].compilations
    model = net(dropout=0.3)
    assert trained(model, "fsdp", recompute=model.blocks, steps=6)[2].compilations <= short


def test_what_was_kept_for_backward_is_let_go_after_it() -> None:
    """A tensor that is there when the program is cut off is one of its results, and takes memory."""
    model = net()
    engine = XLAEngine(model, "fsdp")
    engine.recompute(model.blocks)
    kept: list[weakref.ref[Tensor]] = []
    ups = [block.get_submodule("up") for block in model.blocks]
    for up in ups:
        up.register_forward_pre_hook(lambda _, args: kept.append(weakref.ref(args[0])))
        up.register_forward_pre_hook(lambda module, _: kept.append(weakref.ref(module.weight)))
    loss = model(engine.put_batch(batches(1, torch.float64)[0]))
    loss.backward()  # and not the engine's, which cuts nothing off here either
    assert len(kept) == 4 * BLOCKS
    weights = {id(up.get_parameter("weight")) for up in ups}
    assert all(one() is None or id(one()) in weights for one in kept)
    assert loss.grad_fn is not None


def test_a_step_between_forward_and_backward_is_refused() -> None:
    model = net()
    engine = XLAEngine(model, "fsdp")
    engine.recompute(model.blocks)
    optimizer = torch.optim.SGD(model.blocks[0].parameters(), lr=0.1)
    engine.add_optimizer(optimizer)
    first, second = (model(engine.put_batch(x)) for x in batches(2, torch.float64))
    engine.backward(first)
    optimizer.step()
    with pytest.raises(RuntimeError, match="Expected the parameters of Block to stay .* modified by an inplace"):
        engine.backward(second)


def test_an_input_that_changes_before_backward_is_refused() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    engine = XLAEngine(model, "ddp")
    engine.recompute([model[0]])
    x = engine.put_batch(torch.ones(SAMPLES, WIDTH))
    loss = model(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="like its input"):
        engine.backward(loss)


def test_after_close_the_modules_compute_as_before() -> None:
    model = net()
    engine = XLAEngine(model, "ddp")
    engine.recompute(model.blocks)
    assert "forward" in vars(model.blocks[0])
    engine.close()
    assert all("forward" not in vars(block) for block in model.blocks)


SCRIPT = """
import sys
from functools import partial
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from lightning_accel.core.xla import XLAEngine

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))

model = nn.Sequential(*(Block() for _ in range(3)))
row, how = sys.argv[1:]
engine = XLAEngine(model, row)
if how == "ours":
    engine.recompute(model)
x = engine.put_batch(torch.ones(8, 16))
for block in model:
    x = checkpoint(partial(block, x), use_reentrant=False) if how == "torchs" else block(x)
engine.backward(x.square().sum())
engine.cut()
"""
_BARRIERS_GO = "before_cse_barrier_expander"
"""The compiler for CPUs drops barriers before its last search for common expressions, so the products that are no
different by then are one again. Gathers stay."""


def program(row: str, how: str, folder: Path) -> dict[str, int]:
    """Products of the program when barriers have done their work, and gathers of the compiled one."""
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=.*barrier.*"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, row, how], check=True, timeout=200, env={**os.environ, "XLA_FLAGS": flags}
    )

    def largest(stage: str) -> str:
        return max((path.read_text() for path in folder.glob(f"*SyncTensorsGraph*{stage}.txt")), key=len)

    gathers = len(re.findall(r" all-gather(?:-start)?\(", largest("after_optimizations")))
    return {"products": largest(_BARRIERS_GO).count(" dot("), "gathers": gathers}


@pytest.mark.parametrize(("row", "gathers"), [("ddp", 0), ("fsdp", 12)])
def test_the_program_computes_and_gathers_again(row: str, gathers: int, tmp_path: Path) -> None:
    once, torchs, again = (program(row, how, tmp_path / how) for how in ("none", "torchs", "ours"))
    assert once["gathers"] == gathers, "of each parameter"
    assert torchs == once, "the compiler undoes it"
    # Three blocks of two products, of which the second, like its bias, is not needed in backward.
    assert again == {"products": once["products"] + 3, "gathers": gathers + gathers * 3 // 4}
