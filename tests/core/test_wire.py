"""Gradients that are added up on each rank travel in a dtype of their own: what arrives, and in how many bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from core.test_engine_gradients import reentrant
from core.toys import Net, build, compare, data, mse, my_share, relative_error, sgd, started, train
from harness import Ranks
from lightning_accel.core import Engine, GradScaler
from lightning_accel.core.collectives import Collectives
from lightning_accel.core.connecting import connect
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.layout import even_layout
from lightning_accel.core.placement import Rest, find_row
from lightning_accel.core.torch_collectives import TorchCollectives

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PAIRS = [(F32, BF16), (F32, F16), (F64, F32)]


class Mixture(nn.Module):
    """Small tensors that share a unit, a scalar, and complex parameters, which have a unit of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in (1, 3, 7, 64))
        self.scale = nn.Parameter(torch.randn(()))
        self.phase = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.unused = nn.Parameter(torch.randn(9))


def my_gradients(module: Mixture, rank: int, micro: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * micro + rank)
    return [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in used(module)]


def used(module: Mixture) -> list[nn.Parameter]:
    return [*module.small, module.scale, module.phase]


def reduced(row: str, came: torch.dtype, wire: torch.dtype, accumulate: int) -> tuple[list[Tensor], list[Tensor], bool]:
    """Gradients by the engine, and by the formula: added up as they came, rounded, added up, and rounded on the way
    back to ranks that all have them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    module = build(Mixture, came)
    engine = Engine(module, row, reduce_dtype=wire)
    engine.add_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
    for micro in range(accumulate):
        products = zip(used(module), my_gradients(module, rank, micro), strict=True)
        loss = sum((p * g.conj()).real.sum() if p.is_complex() else (p * g).sum() for p, g in products)
        with engine.no_sync() if micro < accumulate - 1 else contextlib.nullcontext():
            engine.backward(loss)
    found = [_reduced(engine, parameter) for parameter in used(module)]
    expected = []
    for index, parameter in enumerate(used(module)):
        parts = []
        for other in range(ranks):
            part = torch.zeros_like(parameter)
            for micro in range(accumulate):
                part += my_gradients(module, other, micro)[index] / ranks
            parts.append(part if part.is_complex() else part.to(wire))
        total = torch.stack([part.to(parameter.dtype) for part in parts]).sum(0)
        if row == "ddp" and not parameter.is_complex():
            total = total.to(wire).to(parameter.dtype)
        expected.append(total)
    return found, expected, _reduced(engine, module.unused) is None


def _reduced(engine: Engine, parameter: nn.Parameter) -> Any:
    for unit in engine.units:
        for position, candidate in enumerate(unit.parameters):
            if candidate is parameter:
                gradient = unit.full_gradient(position)
                return None if gradient is None else gradient.detach().clone()
    raise AssertionError("no unit has it")


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("came", "wire"), PAIRS, ids=str)
@pytest.mark.parametrize("row", ["ddp", "zero1"])
def test_what_arrives_is_the_sum_of_rounded_values(
    ranks2: Ranks, row: str, came: torch.dtype, wire: torch.dtype, accumulate: int
) -> None:
    """To the bit: of two values there is one sum. (Micro-batches are halved before they are added up: exactly.)"""
    results = ranks2.run(reduced, row, came, wire, accumulate)
    for found, expected, unused_has_none in results:
        assert unused_has_none
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        real = [tensor for tensor in found if not tensor.is_complex()]
        is_rounded = all(torch.equal(tensor, tensor.to(wire).to(came)) for tensor in real)
        assert is_rounded == (row == "ddp")  # zero1 keeps the wide sum
    for ours, others in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(ours, others)


def counted(row: str, wire: torch.dtype | None) -> tuple[dict[str, int], int, int]:
    engine, optimizer = started(row, lambda: Net(64, 4), sgd, bucket_cap_mb=0.02, reduce_dtype=wire)
    train(engine, optimizer, 2, accumulate=3)
    total = sum(unit.layout.total for unit in engine.units)
    return dict(engine.report().bytes_sent), total, len(engine.units)


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("row", ["ddp", "zero1"])
def test_fewer_bytes_travel(world: Ranks, row: str) -> None:
    """Of doubles; in bf16 a quarter. Updated parameters are gathered as before."""
    ranks = len(world.run(dist.get_rank))
    for wire, size in ((None, 8), (F32, 4), (BF16, 2)):
        for sent, total, units in world.run(counted, row, wire):
            assert units > 3
            part = total * (ranks - 1) // ranks
            if row == "ddp":
                assert sent["all_reduce"] == 2 * part * size
                assert set(sent) == {"all_reduce", "agree"}
            else:
                assert sent["reduce_scatter"] == part * size
                assert sent["all_gather"] == part * 8


def summed_by(kinds: list[Callable[[torch.device], Collectives]]) -> list[tuple[Tensor, int]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layout = even_layout([(61,)], ranks)
    generator = torch.Generator().manual_seed(0)
    everyone = torch.randn(ranks, layout.total, generator=generator).bfloat16()
    found = []
    for kind in kinds:
        collectives = kind(torch.device("cpu"))
        out = torch.full((layout.total,), torch.nan)
        collectives.all_reduce_as(out, everyone[rank].clone(), layout).wait()
        found.append((out, collectives.traffic.bytes_sent["all_reduce"]))
        collectives.close()
    # By parts, each by the rank that has it: its own first, then the others' by rank.
    expected = torch.empty(layout.total)
    for owner in range(ranks):
        part = slice(*layout.part(owner))
        expected[part] = everyone[owner].float()[part]
        for other in (other for other in range(ranks) if other != owner):
            expected[part] += everyone[other].float()[part]
    found.append((expected.bfloat16().float(), 2 * 2 * (layout.total - layout.total // ranks)))
    return found


def by_messages(device: torch.device) -> Collectives:
    return GlooCollectives(device, None, None)


def by_torch(device: torch.device) -> Collectives:
    return TorchCollectives(device, None, None)


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
def test_all_ranks_get_the_wide_sum_rounded_once(world: Ranks) -> None:
    results = world.run(summed_by, [connect, by_messages, by_torch])
    for found in results:
        *ours, (torchs, sent), (expected, bytes_sent) = found
        for total, counted_bytes in ours:
            assert torch.equal(total, expected)
            assert counted_bytes == bytes_sent
        assert sent == bytes_sent
        # torch's own adds up in bf16: one rounding of 2**-9 more for each addition, of sums up to about 8.
        torch.testing.assert_close(torchs, expected, rtol=0, atol=len(results) * 8 * 2.0**-8)
        assert torch.equal(torchs, results[0][2][0])


def overflowing(row: str, wire: torch.dtype, which: int) -> tuple[list[bool], float, bool]:
    """A gradient that rank ``which`` alone has, and that fp16 has no number for."""
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    engine = Engine(module, row, reduce_dtype=wire)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-9)
    engine.add_optimizer(optimizer)
    before = [p.detach().clone() for p in module.parameters()]
    factor = 1e7 if dist.get_rank() == which else 1.0
    engine.backward((module[1].bias * factor).sum() + 0.0 * module(torch.ones(6)).sum())
    finite = [bool(torch.isfinite(p.grad).all()) for p in module.parameters()] if row == "ddp" else []
    norm = float(engine.clip_grad_norm_(optimizer, 1e30))
    optimizer.step()
    same = all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    return finite, norm, same


@pytest.mark.parametrize("row", ["ddp", "zero1"])
@pytest.mark.parametrize("which", [0, 1])
def test_overflow_is_seen_by_every_rank(ranks2: Ranks, row: str, which: int) -> None:
    for finite, norm, _ in ranks2.run(overflowing, row, F16, which):
        assert not norm < float("inf")
        assert finite in ([], [True, True, True, False])
    for finite, norm, same in ranks2.run(overflowing, row, BF16, which):
        assert norm == pytest.approx(6**0.5 * 5e6, rel=2.0**-8)
        assert all(finite)
        assert not same


def scaled_steps(row: str) -> tuple[list[float], list[bool]]:
    """fp16 holds the gradients at a scale of 2**10 but not at 2**24, where the first steps are."""
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    engine = Engine(module, row, reduce_dtype=F16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    engine.add_optimizer(optimizer)
    scaler = GradScaler(init_scale=2.0**24, backoff_factor=2.0**-7)
    scales, moved = [], []
    for _ in range(4):
        optimizer.zero_grad()
        before = module.weight.detach().clone()
        engine.backward(scaler.scale(module(torch.ones(2, 4)).sum()))
        scaler.step(optimizer)
        scaler.update()
        scales.append(float(scaler.get_scale()))
        moved.append(not torch.equal(before, module.weight))
    return scales, moved


@pytest.mark.parametrize("row", ["ddp", "zero1"])
def test_loss_scaling_finds_a_scale_that_fits(ranks2: Ranks, row: str) -> None:
    expected = ([2.0**17, 2.0**10, 2.0**10, 2.0**10], [False, False, True, True])
    assert ranks2.run(scaled_steps, row) == [expected] * 2


def beside_torch(wire: torch.dtype) -> tuple[float, float, float]:
    """Five steps: the largest difference of gradients and of losses, and the size of gradients."""
    hook = default_hooks.bf16_compress_hook if wire is BF16 else default_hooks.fp16_compress_hook
    theirs = DistributedDataParallel(build(Net, F32))
    # By another name: torch lets nobody register its bf16 hook by its own without CUDA.
    theirs.register_comm_hook(None, lambda state, bucket: hook(state, bucket))
    engine, optimizer = _ready(build(Net, F32), wire)
    their_optimizer = sgd(theirs.parameters())
    xs, ys = data(5, dist.get_world_size(), F32)
    apart, lost, size = 0.0, 0.0, 0.0
    for x, y in zip(xs, ys, strict=True):
        optimizer.zero_grad()
        their_optimizer.zero_grad()
        loss, their_loss = (mse(model, my_share(x), my_share(y)) for model in (engine.module, theirs))
        engine.backward(loss)
        their_loss.backward()
        pairs = list(zip(engine.module.parameters(), theirs.parameters(), strict=True))
        apart = max(apart, *(float((p.grad - q.grad).abs().max()) for p, q in pairs))  # type: ignore[operator]
        size = max(size, *(float(q.grad.abs().max()) for _, q in pairs))  # type: ignore[union-attr]
        lost = max(lost, abs(float(loss) - float(their_loss)))
        optimizer.step()
        their_optimizer.step()
    return apart, lost, size


def _ready(module: nn.Module, wire: torch.dtype) -> tuple[Engine, torch.optim.Optimizer]:
    engine = Engine(module, "ddp", reduce_dtype=wire)
    optimizer = sgd(module.parameters())
    engine.add_optimizer(optimizer)
    return engine, optimizer


@pytest.mark.parametrize("wire", [BF16, F16], ids=str)
def test_it_is_what_torchs_hooks_do(ranks2: Ranks, wire: torch.dtype) -> None:
    """torch rounds, then halves; here it is halved, then rounded. Among two ranks the same, unless it is a subnormal
    number of fp16 (of which there are few: steps of 2**-24, half a step apart on each of two ranks)."""
    for apart, lost, size in ranks2.run(beside_torch, wire):
        assert size > 0.01
        assert apart <= (0.0 if wire is BF16 else 2.0**-24)
        assert lost <= 2.0**-22


# One rounding to 24 bits on the way out and one on the way back; steps of SGD add up some of these errors.
SINGLE = 8 * 2.0**-24


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("row", ["ddp", "zero1"])
def test_training_is_as_precise_as_what_travels(ranks3: Ranks, row: str, accumulate: int) -> None:
    options: dict[str, Any] = {"bucket_cap_mb": 0.0005, "accumulate": accumulate}
    assert all(0 < error < SINGLE for error in ranks3.run(compare, Net, row, sgd, reduce_dtype=F32, **options))


@pytest.mark.parametrize("row", ["ddp", "zero1"])
def test_late_gradients_travel_alike(ranks2: Ranks, row: str) -> None:
    """Reentrant checkpoints deliver gradients in parts, the last ones after the reduction has started."""
    options: dict[str, Any] = {"loss": reentrant, "bucket_cap_mb": 0.0005, "accumulate": 2}
    assert all(0 < error < SINGLE for error in ranks2.run(compare, Net, row, sgd, reduce_dtype=F32, **options))


def repeated(row: str) -> float:
    """Without ``no_sync``: what was reduced meets what comes."""
    alone = build(Net)
    engine, _ = started(row, Net, sgd, bucket_cap_mb=0.0005, reduce_dtype=F32)
    for x, y in zip(*data(3, dist.get_world_size()), strict=True):
        mse(alone, x, y).backward()
        engine.backward(mse(engine.module, my_share(x), my_share(y)))
    found = [_reduced(engine, parameter) for parameter in engine.module.parameters()]
    return relative_error(found, [p.grad for p in alone.parameters() if p.grad is not None])


@pytest.mark.parametrize("row", ["ddp", "zero1"])
def test_what_was_reduced_meets_what_comes(ranks3: Ranks, row: str) -> None:
    assert all(0 < error < SINGLE for error in ranks3.run(repeated, row))


def by(kind: type[Collectives], row: str) -> float:
    def connected(device: torch.device, group: Any = None) -> Collectives:
        return kind(device, group, group)

    with (
        mock.patch("lightning_accel.core.agreement.connect", connected),
        mock.patch("lightning_accel.core.mesh.connect", connected),
    ):
        return compare(Net, row, sgd, reduce_dtype=F32, bucket_cap_mb=0.0005, accumulate=2)


@pytest.mark.parametrize("kind", [GlooCollectives, pytest.param(TorchCollectives, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("row", ["ddp", "zero1"])
def test_by_messages(ranks3: Ranks, kind: type[Collectives], row: str) -> None:
    assert all(0 < error < SINGLE for error in ranks3.run(by, kind, row))


def locally(row: str, **options: Any) -> float:
    """Parameters rest sharded, too, while gradients are added up on each rank."""
    adds_up = replace(find_row(row), accumulating=Rest.REPLICATED)
    return compare(Net, adds_up, sgd, reduce_dtype=F32, accumulate=3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ["fsdp", pytest.param("fsdp_partial", marks=pytest.mark.matrix)])
def test_rows_that_shard_parameters_may_add_up_locally(ranks2: Ranks, row: str) -> None:
    assert all(0 < error < SINGLE for error in ranks2.run(locally, row))


@pytest.mark.matrix
def test_several_copies(ranks_of: Callable[[int], Ranks]) -> None:
    assert all(0 < error < SINGLE for error in ranks_of(4).run(locally, "fsdp_hybrid", shard_size=2))


def with_master(wire: torch.dtype | None) -> tuple[float, float]:
    """Values that are rounded for computation: gradients are divided by the number of ranks once they are added up."""
    found = []
    for reduce in (None, wire):
        torch.manual_seed(0)
        module = Net(64, 2)
        engine = Engine(module, "zero1", param_dtype=BF16, round_vectors=True, reduce_dtype=reduce)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        engine.add_optimizer(optimizer)
        x, y = data(1, dist.get_world_size(), BF16)
        with engine.forward_context():
            loss = mse(module, my_share(x[0]), my_share(y[0]))
        engine.backward(loss)
        found.append(float(engine.clip_grad_norm_(optimizer, 1e9)))
        engine.close()
    return found[0], found[1]


@pytest.mark.parametrize("wire", [BF16, F16], ids=str)
def test_master_values(ranks2: Ranks, wire: torch.dtype) -> None:
    """Gradients that were computed in bf16 travel in it as they are; in fp16 but for the smallest."""
    for exact, found in ranks2.run(with_master, wire):
        assert exact > 0.01
        assert found == pytest.approx(exact, rel=0.0 if wire is BF16 else 1e-4, abs=0.0)


def wider() -> tuple[list[bool], int, int]:
    """A model in bf16 whose gradients are added up over ranks in fp32."""
    same, sent = [], 0
    for row in ("ddp", "zero1"):
        module = build(lambda: nn.Linear(8, 8), BF16)
        engine = Engine(module, row, reduce_dtype=F32)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        engine.add_optimizer(optimizer)
        share = torch.tensor([1.0, 2.0**-7, 2.0**-7][dist.get_rank()], dtype=BF16) * 3
        engine.backward((module.weight * share).sum() + (module.bias * share).sum())
        thirds = [(torch.tensor(v, dtype=BF16) * 3 * (1 / 3)).to(BF16).float() for v in (1.0, 2.0**-7, 2.0**-7)]
        expected = torch.stack(thirds).sum().to(BF16)
        same.append(bool((_reduced(engine, module.weight) == expected).all()))
        optimizer.step()
        counts = engine.report().bytes_sent
        sent += counts.get("all_reduce", 0) + counts.get("reduce_scatter", 0)
        total = sum(unit.layout.total for unit in engine.units)
    return same, sent, total


def test_what_travels_may_be_wider(ranks3: Ranks) -> None:
    for same, sent, total in ranks3.run(wider):
        assert same == [True, True]
        assert total >= 72
        assert sent == (2 + 1) * 4 * (total - total // 3)  # two thirds to other ranks, and under ddp back
