"""Gradients that travel as products of thin matrices: what arrives, what is left out, and in how many bytes."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from core.test_engine_gradients import reentrant
from core.toys import (
    EXACT,
    Net,
    build,
    compare,
    data,
    mse,
    my_share,
    relative_error,
    sgd,
    started,
    train,
)
from harness import Ranks
from lightning_accel.core import Engine, GradScaler, PowerSGD, low_rank
from lightning_accel.core.collectives import Collectives
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.low_rank import orthonormal
from lightning_accel.core.placement import ROWS
from lightning_accel.core.torch_collectives import TorchCollectives

F32, F64 = torch.float32, torch.float64


def always(rank: int = 1, rate: float = 2, **options: Any) -> PowerSGD:
    return PowerSGD(matrix_approximation_rank=rank, min_compression_rate=rate, start_powerSGD_iter=0, **options)


class Mixture(nn.Module):
    """Matrices, more and fewer dimensions, complex numbers, memory in another order, and what nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(12, 10))
        self.kernel = nn.Parameter(torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last))
        self.vector = nn.Parameter(torch.randn(40))
        self.scale = nn.Parameter(torch.randn(()))
        self.phase = nn.Parameter(torch.randn(12, 16, dtype=torch.complex128))
        self.sometimes = nn.Parameter(torch.randn(9, 11))


def mixture(settings: PowerSGD | None, **options: Any) -> tuple[Engine, Mixture]:
    module = build(Mixture)
    assert isinstance(module, Mixture)
    engine = Engine(module, "ddp", gradient_compression=settings, **options)
    engine.add_optimizer(torch.optim.SGD(module.parameters(), lr=0.0))
    return engine, module


def gradients(module: Mixture, step: int, rank: int) -> dict[str, Tensor]:
    """What a rank contributes in a step. Nobody uses ``sometimes`` in odd steps, and rank 0 alone in even ones."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    made = {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in module.named_parameters()}
    if rank or step % 2:
        del made["sometimes"]
    return made


def loss_of(module: Mixture, step: int) -> Tensor:
    """Its gradients are those."""
    parameters = dict(module.named_parameters())
    total = torch.zeros((), dtype=F64)
    for name, wanted in gradients(module, step, dist.get_rank()).items():
        p = parameters[name]
        total = total + ((p * wanted.conj()).real.sum() if p.is_complex() else (p * wanted).sum())
    return total


def true_means(module: Mixture, step: int) -> dict[str, Tensor]:
    ranks = dist.get_world_size()
    means: dict[str, Tensor] = {}
    for rank in range(ranks):
        for name, part in gradients(module, step, rank).items():
            means[name] = means.get(name, torch.zeros_like(part)) + part / ranks
    return means


def exact(accumulate: int, options: dict[str, Any]) -> float:
    """As many columns as a matrix has are all of it."""
    engine, module = mixture(always(12, 0.01, **options))
    worst = 0.0
    for step in range(4):
        module.zero_grad()
        for micro in range(accumulate):
            with engine.no_sync() if micro < accumulate - 1 else contextlib.nullcontext():
                engine.backward(loss_of(module, step) / accumulate)
        wanted = true_means(module, step)
        for name, parameter in module.named_parameters():
            assert (parameter.grad is None) == (name not in wanted), (name, step)
            if parameter.grad is not None:
                worst = max(worst, relative_error([parameter.grad], [wanted[name]]))
    return worst


@pytest.mark.parametrize("options", [{}, {"warm_start": False}, {"use_error_feedback": False}], ids=str)
def test_all_columns_are_the_exact_sum(ranks3: Ranks, options: dict[str, Any]) -> None:
    assert all(error < EXACT for error in ranks3.run(exact, 2, options))


def conserved(settings: PowerSGD, steps: int, bucket_cap_mb: float) -> tuple[float, float, list[Tensor]]:
    """What was applied and what is left out, beside the sum of all true gradients."""
    engine, module = mixture(settings, bucket_cap_mb=bucket_cap_mb)
    applied = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    given = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    last: list[Tensor] = []
    for step in range(steps):
        module.zero_grad()
        engine.backward(loss_of(module, step))
        last = [p.grad.detach().clone() for p in module.parameters() if p.grad is not None]
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                applied[name] += parameter.grad
        for name, mean in true_means(module, step).items():
            given[name] += mean
    off, left_out = 0.0, 0.0
    assert engine.compression is not None
    for name, parameter in module.named_parameters():
        error = engine.compression.memory(parameter).error
        if error is not None:
            total = error.clone()
            dist.all_reduce(total)
            left_out = max(left_out, float(total.norm() / given[name].norm()))
            applied[name] += total.view(parameter.shape)
        off = max(off, relative_error([applied[name]], [given[name]]))
    return off, left_out, last


@pytest.mark.parametrize("bucket_cap_mb", [25.0, 1e-6])
def test_what_is_not_applied_is_left_out(ranks3: Ranks, bucket_cap_mb: float) -> None:
    """Also of a parameter that no rank uses now and then: what it has been left out of it waits."""
    results = ranks3.run(conserved, always(1, 1.0), 20, bucket_cap_mb)
    for off, left_out, last in results:
        assert off < EXACT
        assert left_out > 0.1
        for ours, others in zip(last, results[0][2], strict=True):
            assert torch.equal(ours, others)


def counted(settings: PowerSGD) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    engine, module = mixture(settings)
    optimizer = engine.optimizers[0].optimizer
    reports = []
    for step in (0, 2):
        engine.backward(loss_of(module, step))
        optimizer.step()
        reports.append(engine.report())
    return reports[0].bytes_sent, reports[1].bytes_sent, reports[1].at_rest


def sent(numel: int, size: int, ranks: int, rank: int) -> int:
    """By two passes over a buffer cut at multiples of 16 elements: all parts but one's own, and one's own to all."""
    part = -(-numel // (ranks * 16)) * 16
    own = min(part * (rank + 1), numel) - min(part * rank, numel)
    return (numel - own + (ranks - 1) * own) * size


@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_bytes_on_the_wire(world: Ranks) -> None:
    """Whole: a vector, a scalar, what is too small, and complex numbers. And 8 bytes for each matrix."""
    rank2 = PowerSGD(matrix_approximation_rank=2, min_compression_rate=1.3, start_powerSGD_iter=1)
    results = world.run(counted, rank2)
    for rank, (first, second, at_rest) in enumerate(results):
        ranks = len(results)
        real = 12 * 10 + 8 * 48 + 40 + 1 + 9 * 11
        phase = sent(192, 16, ranks, rank)
        assert first["all_reduce"] - phase in range(
            sent(real, 8, ranks, rank), sent(real + 128, 8, ranks, rank)
        )  # and padding
        whole = 40 + 1
        columns = (12 + 8 + 9) * 2 + 3, (10 + 48 + 11) * 2
        assert second["all_reduce"] - phase == sum(
            sent(numel, 8, ranks, rank) for numel in (whole + columns[0], columns[1])
        )
        assert at_rest["gradient_compression"] == 8 * (12 * 10 + 8 * 48 + 9 * 11 + columns[1])


def alone() -> tuple[bool, bool]:
    engine, module = mixture(always())
    plain, other = mixture(None)
    for one, inner in ((engine, module), (plain, other)):
        one.backward(loss_of(inner, 0))
    pairs = zip(module.parameters(), other.parameters(), strict=True)
    same = all(torch.equal(p.grad, q.grad) for p, q in pairs)  # type: ignore[arg-type]
    return engine.compression is None, same


@pytest.mark.parametrize("world", [1], indirect=True)
def test_one_rank_compresses_nothing(world: Ranks) -> None:
    assert world.run(alone) == [(True, True)]


class Broken(nn.Module):
    """Two matrices in units of their own, one of them on its own loss, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(20, 20))
        self.b = nn.Parameter(torch.randn(20, 20))
        self.c = nn.Parameter(torch.randn(5))


def overflowing(bad: str, which: int) -> tuple[list[bool], bool, bool, list[Tensor]]:
    """One rank's infinity in one parameter: memories stay, all that is compressed is NaN, and training goes on."""
    rank = dist.get_rank()
    module = build(Broken)
    engine = Engine(module, "ddp", gradient_compression=always(), bucket_cap_mb=1e-6)
    engine.add_optimizer(torch.optim.SGD(module.parameters(), lr=0.0))

    def step(number: int, factor: float) -> list[Tensor]:
        module.zero_grad()
        generator = torch.Generator().manual_seed(10 * number + rank)
        loss = torch.zeros((), dtype=F64)
        for name, p in module.named_parameters():
            wanted = torch.randn(p.shape, dtype=F64, generator=generator)
            if name == bad and rank == which:
                wanted[0] *= factor
            loss = loss + (p * wanted).sum()
        engine.backward(loss)
        return [p.grad.detach().clone() for p in module.parameters() if p.grad is not None]

    step(0, 1.0)
    assert engine.compression is not None
    before = [tensor.clone() for tensor in engine.compression.tensors()]
    broken = step(1, torch.inf)
    after = [tensor.clone() for tensor in engine.compression.tensors()]
    finite = [bool(torch.isfinite(tensor).all()) for tensor in broken]
    kept = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    again = step(2, 1.0)
    return finite, kept, all(bool(torch.isfinite(tensor).all()) for tensor in again), again


@pytest.mark.parametrize(("bad", "which"), [("a", 0), ("b", 1), ("c", 1)])
def test_an_overflow_changes_no_memory(ranks2: Ranks, bad: str, which: int) -> None:
    results = ranks2.run(overflowing, bad, which)
    for finite, kept, goes_on, again in results:
        assert finite == [False, False, bad != "c"]
        assert kept
        assert goes_on
        assert all(torch.equal(x, y) for x, y in zip(again, results[0][3], strict=True))


def scaled(scales: list[float]) -> list[Tensor]:
    """Unscaled gradients of steps with these loss scales."""
    module = build(Broken)
    engine = Engine(module, "ddp", gradient_compression=always(2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    engine.add_optimizer(optimizer)
    scaler = GradScaler(init_scale=scales[0])
    found: list[Tensor] = []
    for number, scale in enumerate(scales):
        scaler.update(scale)
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
        wanted = [torch.randn(p.shape, dtype=F64, generator=generator) for p in module.parameters()]
        loss = torch.zeros((), dtype=F64)
        for p, g in zip(module.parameters(), wanted, strict=True):
            loss = loss + (p * g).sum()
        engine.backward(scaler.scale(loss))
        scaler.step(optimizer)
        found += [p.grad.detach().clone() for p in module.parameters() if p.grad is not None]
    return found


def test_what_is_left_out_follows_the_loss_scale(ranks2: Ranks) -> None:
    """Scales are powers of two: nothing is rounded otherwise, so there is no tolerance but for thresholds of LAPACK."""
    for plain, changing in zip(ranks2.run(scaled, [1.0] * 4), ranks2.run(scaled, [4.0, 1024.0, 2.0, 2.0]), strict=True):
        assert relative_error(changing, plain) < EXACT


def overflowing_steps(overflows: bool) -> tuple[list[Tensor], float, int]:
    """Parameters after four steps; with an overflow on rank 1 after the second one, which halves the scale."""
    module = build(Broken)
    engine = Engine(module, "ddp", gradient_compression=always(), bucket_cap_mb=1e-6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    engine.add_optimizer(optimizer)
    scaler = GradScaler(init_scale=1024.0)
    for number in (0, 1, None, 2, 3) if overflows else (0, 1, 2, 3):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * (number or 0) + dist.get_rank())
        loss = torch.zeros((), dtype=F64)
        for p in module.parameters():
            loss = loss + (p * torch.randn(p.shape, dtype=F64, generator=generator)).sum()
        if number is None and dist.get_rank() == 1:
            loss = loss + torch.inf * module.c.sum()
        engine.backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        engine.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
    return [p.detach().clone() for p in module.parameters()], scaler.get_scale(), scaler.skipped_steps


def test_a_skipped_step_leaves_no_trace(ranks2: Ranks) -> None:
    """But half the scale: a power of two, so that nothing else is rounded otherwise."""
    pairs = zip(ranks2.run(overflowing_steps, True), ranks2.run(overflowing_steps, False), strict=True)
    for (found, scale, skipped), (expected, _, _) in pairs:
        assert (scale, skipped) == (512.0, 1)
        assert relative_error(found, expected) < EXACT


class Thin(nn.Module):
    """One matrix to compress: torch draws for all matrices of a bucket in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(7, 24)
        self.last = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.wide(x)))


RATES = {1: 2.8, 2: 2.0, 3: 1.5}
"""By columns: so that the first matrix is compressed and the last is not."""


def beside_torch(rank: int, warm_start: bool) -> tuple[float, float]:
    theirs = DistributedDataParallel(build(Thin))
    state = PowerSGDState(None, rank, start_powerSGD_iter=2, min_compression_rate=RATES[rank], warm_start=warm_start)
    theirs.register_comm_hook(state, powerSGD_hook)
    settings = PowerSGD(rank, 2, RATES[rank], warm_start=warm_start)
    draws = np.random.RandomState(0)

    def drawn(matrix: Any, name: str) -> Tensor:
        """As torch does."""
        torch.manual_seed(draws.randint(1_000_000_000))
        return orthonormal(torch.randn(matrix.values.shape[1], rank, dtype=F64))

    xs, ys = data(20, dist.get_world_size())
    with mock.patch.object(low_rank._Matrix, "_drawn", drawn):
        engine, optimizer = started("ddp", Thin, sgd, gradient_compression=settings)
        their_optimizer = sgd(theirs.parameters())
        for x, y in zip(xs, ys, strict=True):
            optimizer.zero_grad()
            their_optimizer.zero_grad()
            engine.backward(mse(engine.module, my_share(x), my_share(y)))
            mse(theirs, my_share(x), my_share(y)).backward()
            optimizer.step()
            their_optimizer.step()
    exact, other = started("ddp", Thin, sgd)
    train(exact, other, 20)
    ours = list(engine.module.parameters())
    return relative_error(ours, theirs.parameters()), relative_error(ours, exact.module.parameters())


@pytest.mark.parametrize(("rank", "warm_start"), [(1, True), (2, True), (2, False), (3, True)])
def test_it_is_what_torchs_hook_does(ranks2: Ranks, rank: int, warm_start: bool) -> None:
    """The same algebra (of sums here, of means there) in another order: 20 steps of double precision are apart by
    roundings that the orthogonalisation of nearly dependent columns enlarges; compression itself by 1e-3 and more."""
    for apart, compressed in ranks2.run(beside_torch, rank, warm_start):
        assert apart < 1e-9
        assert compressed > 1e-4


def low_rank_loss() -> tuple[float, float, float]:
    """Before and after training with one column, and after training without compression."""

    def loss(module: nn.Module) -> float:
        xs, ys = data(1, dist.get_world_size())
        return float(mse(module, xs[0], ys[0]))

    found = []
    for settings in (always(), None):
        engine, optimizer = started("ddp", Thin, sgd, gradient_compression=settings)
        found.append(loss(engine.module))
        for _ in range(100):
            train(engine, optimizer, 1)
        found.append(loss(engine.module))
    return found[0], found[1], found[3]


def test_training_goes_where_it_goes_without(ranks2: Ranks) -> None:
    for before, after, without in ranks2.run(low_rank_loss):
        assert without < 0.1 * before
        assert after < 0.1 * before


ALL: dict[str, Any] = {"gradient_compression": always(13, 0.01)}


@pytest.mark.parametrize("bucket_cap_mb", [0.0005, pytest.param(25.0, marks=pytest.mark.matrix)])
def test_late_gradients_travel_whole(ranks2: Ranks, bucket_cap_mb: float) -> None:
    """Reentrant checkpoints deliver gradients in parts, the last ones after the reduction has started."""
    options: dict[str, Any] = {"loss": reentrant, "bucket_cap_mb": bucket_cap_mb, "accumulate": 2, **ALL}
    assert all(error < EXACT for error in ranks2.run(compare, Net, "ddp", sgd, **options))


def repeated(settings: PowerSGD) -> float:
    """Without ``no_sync``: what was reduced meets what comes; what is applied is with what is left out the sum."""
    alone = build(Net)
    engine, _ = started("ddp", Net, sgd, bucket_cap_mb=0.0005, gradient_compression=settings)
    for x, y in zip(*data(3, dist.get_world_size()), strict=True):
        mse(alone, x, y).backward()
        engine.backward(mse(engine.module, my_share(x), my_share(y)))
    assert engine.compression is not None
    found = []
    for parameter in engine.module.parameters():
        assert parameter.grad is not None
        error = engine.compression.memory(parameter).error
        total = torch.zeros_like(parameter) if error is None else error.view(parameter.shape).clone()
        dist.all_reduce(total)
        found.append(parameter.grad + total)
    return relative_error(found, [p.grad for p in alone.parameters() if p.grad is not None])


def test_what_was_reduced_meets_what_comes(ranks3: Ranks) -> None:
    assert all(error < EXACT for error in ranks3.run(repeated, always()))


def by(kind: type[Collectives]) -> float:
    def connected(device: torch.device, group: Any = None) -> Collectives:
        return kind(device, group, group)

    with (
        mock.patch("lightning_accel.core.agreement.connect", connected),
        mock.patch("lightning_accel.core.mesh.connect", connected),
    ):
        return compare(Net, "ddp", sgd, bucket_cap_mb=0.0005, accumulate=2, **ALL)


@pytest.mark.parametrize("kind", [GlooCollectives, pytest.param(TorchCollectives, marks=pytest.mark.matrix)])
def test_by_messages(ranks3: Ranks, kind: type[Collectives]) -> None:
    assert all(error < EXACT for error in ranks3.run(by, kind))


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (9, 4)], ids=str)
def test_orthonormal_of_anything(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Zeros and dependent columns have orthonormal ones, too."""
    torch.manual_seed(0)
    one = torch.randn(shape[0], 1, dtype=F32).expand(shape).to(dtype)
    for columns in (torch.zeros(shape, dtype=dtype), one, torch.randn(shape).to(dtype)):
        found = orthonormal(columns)
        assert found.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.T.float() @ found.float(), torch.eye(shape[1]), rtol=0, atol=8 * eps)


@pytest.mark.parametrize("row", sorted(set(ROWS) - {"ddp"}))
def test_other_rows_are_refused(row: str) -> None:
    with pytest.raises(ValueError, match=f"Expected gradient_compression for row 'ddp' only, got PowerSGD.*'{row}'"):
        Engine(nn.Linear(2, 2), row, gradient_compression=PowerSGD())


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="without reduce_dtype, got PowerSGD and torch.bfloat16"):
        Engine(nn.Linear(2, 2), "ddp", gradient_compression=PowerSGD(), reduce_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("matrix_approximation_rank", 0),
        ("matrix_approximation_rank", 1.5),
        ("start_powerSGD_iter", -1),
        ("start_powerSGD_iter", True),
        ("min_compression_rate", 0),
        ("min_compression_rate", float("nan")),
        ("random_seed", -1),
    ],
)
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Expected {name} to be "):
        PowerSGD(**{name: value})


def test_what_is_compressed() -> None:
    """As torch says it: less than half the numbers, by default."""
    assert [always().rank_of(torch.Size(shape), F32) for shape in ((4, 4), (5, 4), (8, 8), (64,), (), (0, 9))] == [
        *(0, 1, 1, 0, 0, 0)
    ]
    assert always(4).rank_of(torch.Size((2, 1000)), F32) == 0
    assert always(4).rank_of(torch.Size((64, 8, 8)), F32) == 4
    assert always().rank_of(torch.Size((64, 64)), torch.complex64) == 0


def resumed() -> tuple[list[str], bool, bool]:
    """Warnings of two loads, whether anything is kept after them, and whether the next reduction is a whole one."""
    settings = PowerSGD(start_powerSGD_iter=1)
    engine, optimizer = started("ddp", Thin, sgd, gradient_compression=settings)
    train(engine, optimizer, 3)
    assert engine.compression is not None
    assert engine.compression.tensors()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
    empty = not engine.compression.tensors()
    train(engine, optimizer, 1)
    whole = not engine.compression.tensors()
    return [str(one.message) for one in caught if "PowerSGD" in str(one.message)], empty, whole


def test_it_starts_anew_from_a_checkpoint_and_says_so(ranks2: Ranks) -> None:
    for rank, (caught, empty, whole) in enumerate(ranks2.run(resumed)):
        assert len(caught) == (rank == 0)
        assert all("starts anew, with 1 whole reductions" in message for message in caught)
        assert empty
        assert whole


def drawn(settings: PowerSGD) -> tuple[list[Tensor], bool]:
    """What two steps apply, and whether torch's generator was left alone."""
    engine, module = mixture(settings)
    before, found = torch.get_rng_state(), []
    for step in (0, 2):
        module.zero_grad()
        engine.backward(loss_of(module, step))
        found += [p.grad.clone() for p in (module.matrix, module.kernel) if p.grad is not None]
    return found, torch.equal(before, torch.get_rng_state())


def test_directions_are_drawn_alike(ranks2: Ranks) -> None:
    runs = [ranks2.run(drawn, always(warm_start=False, random_seed=seed)) for seed in (0, 0, 1)]
    for run in runs:
        assert all(untouched for _, untouched in run)
        for ours, others in zip(run[0][0], run[1][0], strict=True):
            assert torch.equal(ours, others)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0][0], runs[1][0][0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0][0][0], runs[2][0][0], strict=True))
