"""With weights, ranks and micro-batches count by what their losses are means of."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.toys import Net, adamw, build, relative_error, values
from harness import Ranks
from lightning_accel.core import Engine, GradScaler
from rows import everyday

ROWS = ["ddp", "zero1", "zero2", "fsdp", "fsdp_partial"]
EXACT = 1e-12
STEPS, MICRO = 20, 3


def counts(ranks: int) -> list[list[list[int]]]:
    """How many tokens there are, by step, micro-batch and rank; none in some."""
    generator = torch.Generator().manual_seed(3)
    found = torch.randint(0, 6, (STEPS, MICRO, ranks), generator=generator)
    found[0, 0, 0] = found[1, :, 0] = 0  # the first of all; all of a rank's in a step
    found[:, -1, -1] += 1  # not all of a step's
    return found.tolist()


def batch(step: int, micro: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    x = torch.randn(size, 7, generator=generator, dtype=torch.float64)
    return x, torch.randn(size, 3, generator=generator, dtype=torch.float64)


def mean(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """NaN, with gradients of NaN, if there are no samples: as torch's mean losses."""
    return (module(x) - y).square().mean()


def alone(ranks: int) -> nn.Module:
    """A single process, on all samples of a step in one batch."""
    module = build(Net)
    optimizer = adamw(module.parameters())
    for step, sizes in enumerate(counts(ranks)):
        parts = [batch(step, m, r, size) for m, row in enumerate(sizes) for r, size in enumerate(row)]
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        optimizer.zero_grad()
        mean(module, x, y).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
    return module


def error(row: str, synchronised: bool, scale: bool, **options: Any) -> float:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    expected = alone(ranks)
    module = build(Net)
    assert relative_error(expected.parameters(), module.parameters()) > 1e-2
    engine = Engine(module, row, **options)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    scaler = GradScaler("static", init_scale=2.0**10, enabled=scale)
    for step, sizes in enumerate(counts(ranks)):
        optimizer.zero_grad()
        for micro, row_sizes in enumerate(sizes):
            size = row_sizes[rank]
            last = micro == MICRO - 1
            with engine.forward_context():
                loss = mean(module, *batch(step, micro, rank, size))
            assert math.isnan(float(loss)) == (size == 0)
            engine.set_loss_weight(torch.tensor(size) if micro else size)
            with contextlib.nullcontext() if last or synchronised else engine.no_sync():
                engine.backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        engine.clip_grad_norm_(optimizer, 0.5)
        scaler.step(optimizer)
        scaler.update() if scale else None
    found = relative_error(values(engine), expected.parameters())
    engine.close()
    return found


@pytest.mark.parametrize("synchronised", [False, True], ids=["", "synchronised"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_it_equals_a_single_process_on_the_concatenated_batch(ranks3: Ranks, row: str, synchronised: bool) -> None:
    assert max(ranks3.run(error, row, synchronised, False)) < EXACT


@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_with_a_loss_scale(ranks2: Ranks, row: str) -> None:
    assert max(ranks2.run(error, row, False, True)) < EXACT


@pytest.mark.matrix
def test_several_copies(ranks_of: Any) -> None:
    assert max(ranks_of(4).run(error, "fsdp_hybrid", False, False, shard_size=2)) < EXACT


def one_weight(row: str) -> Engine:
    module = build(lambda: nn.Linear(2, 1, bias=False))
    engine = Engine(module, row)
    engine.add_optimizer(torch.optim.SGD(module.parameters(), lr=1.0))
    return engine


def backward(engine: Engine, weight: float | None) -> None:
    with engine.forward_context():
        loss = engine.module(torch.ones(1, 2, dtype=torch.float64)).sum()
    if weight is not None:
        engine.set_loss_weight(weight)
    engine.backward(loss)


def on_one_rank_only(row: str) -> None:
    backward(one_weight(row), 1.0 if dist.get_rank() else None)


def on_one_micro_batch_only(row: str) -> None:
    engine = one_weight(row)
    with engine.no_sync():
        backward(engine, None)
    backward(engine, 2.0)


def on_top_of_a_step(row: str) -> None:
    engine = one_weight(row)
    backward(engine, 1.0)
    engine.optimizers[0].optimizer.step()
    backward(engine, 1.0)


def within_no_sync_only(row: str) -> None:
    engine = one_weight(row)
    with engine.no_sync():
        backward(engine, 100.0)
    engine.clip_grad_norm_(engine.optimizers[0].optimizer, 1.0)


def without_optimizer(row: str) -> None:
    backward(Engine(build(lambda: nn.Linear(2, 1, bias=False)), row), 1.0)


@pytest.mark.parametrize("row", everyday(["ddp", "zero2"]))
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (within_no_sync_only, "outside of no_sync"),
        (without_optimizer, "Expected an optimizer before losses have weights"),
        (on_one_rank_only, "to have a weight or none to have one, got both for a SGD"),
        (on_one_micro_batch_only, "to have a weight or none to have one, got both for a SGD"),
        (on_top_of_a_step, "Expected gradients to be dropped"),
    ],
)
def test_what_cannot_be_a_mean_is_an_error_on_all_ranks(ranks2: Ranks, row: str, mistake: Any, message: str) -> None:
    for found in ranks2.run_expecting_error(mistake, row):
        assert found is not None
        assert found[0] == "RuntimeError"
        assert message in found[1]


def after_a_skipped_step(row: str) -> list[float]:
    engine = one_weight(row)
    optimizer = engine.optimizers[0].optimizer
    scaler = GradScaler(init_scale=4.0)
    start = values(engine)[0]
    for bad in (True, False):
        optimizer.zero_grad()
        with engine.forward_context():
            loss = engine.module(torch.full((1, 2), math.inf if bad else 1.0, dtype=torch.float64)).sum()
        engine.set_loss_weight(7 if bad else 1 + dist.get_rank())
        engine.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
    return (start - values(engine)[0]).flatten().tolist()


@pytest.mark.parametrize("row", everyday(["ddp", "zero2"]))
def test_what_was_skipped_does_not_count(ranks2: Ranks, row: str) -> None:
    for moved in ranks2.run(after_a_skipped_step, row):
        assert moved == pytest.approx([1.0, 1.0], rel=1e-12)


def of_two_optimizers(row: str) -> list[float]:
    """One optimizer's losses have weights, the other's have none; each backward is of one of them."""
    module = build(lambda: nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)]))
    engine = Engine(module, row)
    optimizers = [torch.optim.SGD(part.parameters(), lr=1.0) for part in module]
    for optimizer in optimizers:
        engine.add_optimizer(optimizer)
    start = values(engine)
    size = 1.0 + dist.get_rank()  # 1 and 2
    for index, weight in ((0, size), (1, None)):
        with engine.forward_context():
            loss = module[index](torch.full((1, 1), size, dtype=torch.float64)).sum()
        if weight is not None:
            engine.set_loss_weight(weight)
        engine.backward(loss)
    for optimizer in optimizers:
        optimizer.step()
    return [float(a - b) for a, b in zip(start, values(engine), strict=True)]


@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_each_optimizer_has_a_mean_of_its_own(ranks2: Ranks, row: str) -> None:
    for moved in ranks2.run(of_two_optimizers, row):
        assert moved == pytest.approx([(1 * 1 + 2 * 2) / 3, 1.5], rel=1e-12)


def in_turns(row: str) -> list[float]:
    """As GANs are trained: each optimizer drops its own gradients before its own backward, and steps after it."""
    module = build(lambda: nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)]))
    engine = Engine(module, row)
    optimizers = [torch.optim.SGD(part.parameters(), lr=1.0) for part in module]
    for optimizer in optimizers:
        engine.add_optimizer(optimizer)
    start = values(engine)
    size = 1.0 + dist.get_rank()  # 1 and 2
    for _ in range(2):
        for part, optimizer in zip(module, optimizers, strict=True):
            optimizer.zero_grad()
            with engine.forward_context():
                loss = part(torch.full((1, 1), size, dtype=torch.float64)).sum()
            engine.set_loss_weight(size)
            engine.backward(loss)
            optimizer.step()
    return [float(a - b) for a, b in zip(start, values(engine), strict=True)]


@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_optimizers_may_take_turns(ranks2: Ranks, row: str) -> None:
    for moved in ranks2.run(in_turns, row):
        assert moved == pytest.approx([2 * (1 * 1 + 2 * 2) / 3] * 2, rel=1e-12)


def without_a_token(row: str) -> list[float]:
    engine = one_weight(row)
    start = values(engine)[0]
    backward(engine, 0.0)
    engine.optimizers[0].optimizer.step()
    return (start - values(engine)[0]).flatten().tolist()


def test_no_token_at_all_changes_nothing(ranks2: Ranks) -> None:
    assert ranks2.run(without_a_token, "zero2") == [[0.0, 0.0]] * 2


def bad_weights() -> list[str]:
    engine = one_weight("ddp")
    messages = []
    for weight in (-1, math.nan, math.inf, torch.ones(2)):
        with pytest.raises(ValueError, match="loss weight") as raised:
            engine.set_loss_weight(weight)
        messages.append(str(raised.value))
    backward(engine, None)  # none of them was taken
    return messages


def test_bad_weights(ranks2: Ranks) -> None:
    messages = ranks2.run(bad_weights)[0]
    assert "got -1.0" in messages[0]
    assert "shape (2,)" in messages[3]
