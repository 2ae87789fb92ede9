"""Scaling under each row: one verdict for all ranks, and the numbers of a single process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from core.toys import ROW_NAMES, Net, adamw, build, data, mse, my_share, relative_error, sgd, values
from harness import Ranks
from lightning_accel.core import Engine, GradScaler
from rows import everyday

FLOAT64 = 1e-12  # as in tests/strategies/models.py


# ------------------------------------------------------------------ one process


def one_parameter(gradient: Any = (8.0, 16.0)) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor(gradient)
    return parameter, torch.optim.SGD([parameter], lr=1.0)


def test_scale_goes_through_containers_and_makes_room() -> None:
    scaler = GradScaler(init_scale=2.0**16)
    one = torch.ones((), dtype=torch.float16)
    scaled = scaler.scale(one)
    assert scaled.dtype is torch.float32
    assert scaled == 2.0**16
    first, (second,) = scaler.scale([one, (one,)])
    assert first == second == 2.0**16
    assert next(iter(scaler.scale(iter([one])))) == 2.0**16
    with pytest.raises(TypeError, match="tensor or an iterable of tensors to scale, got float"):
        scaler.scale(1.0)


def test_it_unscales_and_steps() -> None:
    parameter, optimizer = one_parameter()
    scaler = GradScaler(init_scale=8.0, growth_interval=1)
    scaler.unscale_(optimizer)
    assert parameter.grad.tolist() == [1.0, 2.0]
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [-1.0, -2.0]
    assert (scaler.get_scale(), scaler.skipped_steps) == (16.0, 0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_it_skips_what_is_not_finite(bad: float) -> None:
    parameter, optimizer = one_parameter((1.0, bad))
    scaler = GradScaler(init_scale=8.0)
    assert scaler.step(optimizer) is None
    scaler.update()
    assert parameter.tolist() == [0.0, 0.0]
    assert (scaler.get_scale(), scaler.skipped_steps) == (4.0, 1)


def test_a_norm_that_overflows_is_no_overflow() -> None:
    parameter, optimizer = one_parameter((1e30, 1e30))  # finite, with squares that are not
    scaler = GradScaler(init_scale=1.0)
    scaler.step(optimizer)
    assert parameter.tolist() == pytest.approx([-1e30, -1e30])
    assert scaler.skipped_steps == 0


def test_each_optimizer_has_its_own_verdict_or_all_a_common_one() -> None:
    for common, moved in [(False, [0.0, -1.0]), (True, [0.0, 0.0])]:
        scaler = GradScaler(init_scale=8.0, common_verdict=common)
        (first, bad), (second, good) = one_parameter((math.inf, 8.0)), one_parameter((8.0, 8.0))
        for optimizer in (bad, good):
            scaler.unscale_(optimizer)
        for optimizer in (good, bad):
            scaler.step(optimizer)
        scaler.update()
        assert [first[1].item(), second[1].item()] == moved
        assert scaler.get_scale() == 4.0  # one update for both
        assert scaler.skipped_steps == (2 if common else 1)


def test_calls_out_of_order() -> None:
    scaler = GradScaler()
    _, optimizer = one_parameter()
    _, other = one_parameter()
    with pytest.raises(RuntimeError, match=r"step\(optimizer\) or unscale_\(optimizer\) before scaler.update"):
        scaler.update()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="called for this optimizer already"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="between two steps"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="no closure"):
        scaler.step(other, closure=lambda: None)
    together = GradScaler(common_verdict=True)
    together.step(optimizer)
    with pytest.raises(RuntimeError, match="before the first of them steps"):
        together.unscale_(other)


def test_gradients_that_cannot_be_unscaled() -> None:
    half = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match=r"got torch.float16.*under torch.autocast"):
        GradScaler().unscale_(torch.optim.SGD([half], lr=1.0))


def test_disabled_it_does_nothing() -> None:
    parameter, optimizer = one_parameter()
    scaler = GradScaler(enabled=False)
    loss = torch.ones(())
    assert scaler.scale(loss) is loss
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [-8.0, -16.0]
    assert (scaler.get_scale(), scaler.is_enabled(), scaler.state_dict()) == (1.0, False, {})
    scaler.load_state_dict({})


def test_new_scale() -> None:
    scaler = GradScaler()
    scaler.update(512.0)
    assert scaler.get_scale() == 512.0
    scaler.update(torch.tensor(256.0))
    assert scaler.get_scale() == 256.0
    with pytest.raises(ValueError, match="positive"):
        scaler.update(0.0)


def test_state_and_the_likeness_of_torchs() -> None:
    theirs = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    scaler = GradScaler.like(theirs)
    assert scaler.get_scale() == 64.0
    scaler.step(one_parameter((math.inf, 0.0))[1])
    scaler.update()
    state = scaler.state_dict()
    again = GradScaler()
    again.load_state_dict(state)
    assert (again.get_scale(), again.skipped_steps) == (32.0, 1)
    assert again.state_dict() == state
    theirs.load_state_dict(state)
    assert theirs.get_scale() == 32.0
    assert not GradScaler.like(torch.amp.GradScaler("cpu", enabled=False)).is_enabled()


# --------------------------------------------------------------------- each row


def one_inf(row: str, fused: bool, clip: bool, **options: Any) -> tuple[list[Any], list[int], list[float]]:
    """Four steps with two optimizers; in the second, the last rank's part of the first's gradients has an Inf.

    Returns the parameters after each step, the skipped steps and the scales.
    """
    module = build(Net)
    engine = Engine(module, row, **options)
    blocks = list(module.blocks.parameters())
    others = [p for p in module.parameters() if all(p is not block for block in blocks)]
    optimizers = [torch.optim.AdamW(some, lr=0.01, fused=fused) for some in (blocks, others)]
    sides = [engine.add_optimizer(optimizer) for optimizer in optimizers]
    scaler = GradScaler(init_scale=2.0**16)
    xs, ys = data(4, dist.get_world_size())
    seen, skipped, scales = [values(engine)], [], []
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with engine.forward_context():
            loss = mse(module, my_share(xs[step]), my_share(ys[step]))
        engine.backward(scaler.scale(loss))
        if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            sides[0].gradients.tensors()[-1][-1] = math.inf
        for optimizer in optimizers:
            if clip:
                scaler.unscale_(optimizer)
                norm = engine.clip_grad_norm_(optimizer, 0.1)
                assert bool(torch.isfinite(norm)) or step == 1
            scaler.step(optimizer)
        scaler.update()
        seen.append(values(engine))
        skipped.append(scaler.skipped_steps)
        scales.append(scaler.get_scale())
    engine.close()
    return seen, skipped, scales


def require_skipped_by_all(results: list[Any]) -> None:
    inside = {2, 3, 4, 5, 6, 7}  # first.weight, first.bias, then the blocks' three weights and biases
    for seen, skipped, scales in results:
        assert skipped == [0, 1, 1, 1]
        assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**15]
        for step, (before, after) in enumerate(zip(seen, seen[1:], strict=False)):
            for position, (a, b) in enumerate(zip(before, after, strict=True)):
                assert bool(torch.isfinite(b).all())
                assert torch.equal(a, b) == (step == 1 and position in inside)
        for ours, first in zip(seen, results[0][0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, first, strict=True)), "ranks differ"


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_an_inf_in_one_part_of_one_optimizer_is_skipped_by_all(ranks2: Ranks, row: str) -> None:
    # For replicated rows only one rank has the Inf at all, as no reduction could leave it.
    require_skipped_by_all(ranks2.run(one_inf, row, fused=row != "zero2", clip=row != "ddp"))


@pytest.mark.matrix
@pytest.mark.parametrize("shard_size", [1, 2, 4])
def test_an_inf_in_one_copy_is_skipped_by_all(ranks_of: Any, shard_size: int) -> None:
    require_skipped_by_all(ranks_of(4).run(one_inf, "fsdp_hybrid", fused=True, clip=True, shard_size=shard_size))


def scaled(
    row: str, kind: str, clip: str, settings: dict[str, Any], **options: Any
) -> tuple[float, list[float], list[float]]:
    """Error of parameters after six steps relative to an unscaled process, and the norms of both."""
    make = {"sgd": sgd, "adamw": adamw}[kind]
    alone, ranks = build(Net), dist.get_world_size()
    plain, expected, found = make(alone.parameters()), [], []
    xs, ys = data(6, ranks)
    module = build(Net)
    engine = Engine(module, row, **options)
    optimizer = make(module.parameters())
    engine.add_optimizer(optimizer)
    scaler = GradScaler(**settings)
    for x, y in zip(xs, ys, strict=True):
        plain.zero_grad()
        mse(alone, x, y).backward()
        optimizer.zero_grad()
        with engine.forward_context():
            loss = mse(module, my_share(x), my_share(y))
        engine.backward(scaler.scale(loss))
        if clip:
            scaler.unscale_(optimizer)
        if clip == "norm":
            expected.append(float(torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)))
            found.append(float(engine.clip_grad_norm_(optimizer, 0.1)))
        elif clip == "value":
            torch.nn.utils.clip_grad_value_(alone.parameters(), 0.01)
            engine.clip_grad_value_(optimizer, 0.01)
        plain.step()
        scaler.step(optimizer)
        scaler.update()
    error = relative_error(values(engine), alone.parameters())
    engine.close()
    return error, found, expected


@pytest.mark.parametrize(
    ("kind", "clip", "settings"),
    [
        ("adamw", "", {"rule": "deepspeed", "growth_interval": 1}),
        ("sgd", "norm", {"growth_interval": 2}),
        pytest.param("sgd", "value", {"rule": "static", "init_scale": 8.0}, marks=pytest.mark.matrix),
    ],
    ids=["plain", "norm", "value"],
)
@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_scaling_changes_nothing_but_rounding(
    ranks2: Ranks, row: str, kind: str, clip: str, settings: dict[str, Any]
) -> None:
    # Powers of two are multiplied and divided by without rounding.
    for error, found, expected in ranks2.run(scaled, row, kind, clip, settings):
        assert error < FLOAT64
        assert found == pytest.approx(expected, rel=FLOAT64)


@pytest.mark.matrix
@pytest.mark.parametrize(("row", "offload"), [("zero2", "optimizer"), ("fsdp", "parameters")])
def test_scaling_with_offload(ranks2: Ranks, row: str, offload: str) -> None:
    for error, found, expected in ranks2.run(scaled, row, "sgd", "norm", {"growth_interval": 2}, offload=offload):
        assert error < FLOAT64
        assert found == pytest.approx(expected, rel=FLOAT64)


def fused(row: str) -> list[bool]:
    """Whether a fused optimizer offers to unscale: before, with an engine, with another one, and after it."""
    module = build(Net, torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    said = [optimizer._step_supports_amp_scaling]
    for _ in range(2):  # the second engine takes the optimizer over
        engine = Engine(module, row)
        engine.add_optimizer(optimizer)
        said.append(optimizer._step_supports_amp_scaling)
        engine.close()
    optimizer._engine_optimizer.give_up()
    said.append(optimizer._step_supports_amp_scaling)
    return said


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_fused_optimizers_leave_unscaling_to_the_scaler(ranks2: Ranks, row: str) -> None:
    for said in ranks2.run(fused, row):
        assert said == [True, False, False, True]


def in_turn(row: str) -> list[Any]:
    """Two optimizers that are unscaled together and step with an update each, as Lightning does it."""
    module = build(lambda: nn.Linear(1, 1))
    engine = Engine(module, row)
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in module.parameters()]
    for optimizer in optimizers:
        engine.add_optimizer(optimizer)
    scaler = GradScaler(init_scale=4.0, growth_interval=1)
    start, seen = values(engine), []
    for step in range(2):
        with engine.forward_context():
            loss = module(torch.ones(1, 1, dtype=torch.float64)).sum()
        engine.backward(scaler.scale(loss))
        if step == 1:
            for gradient in engine.optimizers[1].gradients.tensors():  # none on ranks that have no part of it
                gradient.fill_(math.inf)
        for optimizer in optimizers * 2:  # a second time changes nothing
            scaler.unscale_(optimizer)
        for optimizer in optimizers:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        moved = [float(a - b) for a, b in zip(start, values(engine), strict=True)]
        seen.append((moved, scaler.get_scale(), scaler.skipped_steps))
    with engine.forward_context():
        loss = module(torch.ones(1, 1, dtype=torch.float64)).sum()
    engine.backward(scaler.scale(loss), retain_graph=True)
    scaler.unscale_(optimizers[0])
    engine.backward(scaler.scale(loss))
    with pytest.raises(RuntimeError, match="called for this optimizer already"):
        scaler.unscale_(optimizers[0])
    engine.close()
    return seen


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_gradients_are_divided_once_and_each_verdict_counts_once(ranks2: Ranks, row: str) -> None:
    for seen in ranks2.run(in_turn, row):
        # The verdict of both is there at the first of the two updates.
        assert seen == [([1.0, 1.0], 8.0, 0), ([2.0, 1.0], 4.0, 1)]


def shown(row: str) -> list[list[float]]:
    """A parameter's gradient before and after it is unscaled, as ``full_gradient`` and as the user finds it."""
    module = build(lambda: nn.Linear(1, 1))
    engine = Engine(module, row)
    optimizer = sgd(module.parameters())
    engine.add_optimizer(optimizer)
    scaler = GradScaler(init_scale=4.0)
    with engine.forward_context():
        loss = module(torch.ones(1, 1, dtype=torch.float64)).sum()
    engine.backward(scaler.scale(loss))
    found = []
    for unscale in (False, True):
        if unscale:
            scaler.unscale_(optimizer)
        found.append([engine.full_gradient(module.weight).item()])
        if row == "ddp":
            found[-1].append(module.weight.grad.item())
    engine.close()
    return found


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_gradients_are_scaled_until_they_are_unscaled(ranks2: Ranks, row: str) -> None:
    for before, after in ranks2.run(shown, row):
        assert set(before) == {4.0}
        assert set(after) == {1.0}
