"""Mixed precision: what the model computes with is narrower than what the optimizer updates."""

from __future__ import annotations

import contextlib
import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.toys import Net, adamw, build, compare, data, my_share, relative_error, sgd, values
from harness import Ranks
from lightning_accel.core import Engine
from lightning_accel.core.connecting import connect
from lightning_accel.core.dtypes import Dtypes
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.layout import even_layout
from lightning_accel.core.placement import Rest, find_row
from lightning_accel.core.torch_collectives import TorchCollectives
from rows import everyday

EXACT = 1e-12  # double precision, two orders of the same sums
MIXED = ["zero1", "zero2", "fsdp", "fsdp_partial"]


class Affine(nn.Module):
    """A linear layer that computes in double with whatever its parameters were rounded to."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -0.5, 0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.double().T + self.bias.double())


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Affine(7, 13)
        self.blocks = nn.ModuleList(Affine(13, 13) for _ in range(3))
        self.last = Affine(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def loss_of(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((module(x) - y) ** 2).mean()


def train_alone(
    master: nn.Module, steps: int, ranks: int, accumulate: int, clip: float | None, vectors: bool = False
) -> None:
    """What mixed precision means: forward and backward on rounded weights, for each rank's share by itself, gradients
    added up and weights updated in double."""
    optimizer = adamw(master.parameters())
    xs, ys = data(steps * accumulate, ranks)
    for step in range(steps):
        optimizer.zero_grad()
        for parameter in master.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for i in range(step * accumulate, (step + 1) * accumulate):
            for rank in range(ranks):
                rounded = build(Layers)
                for parameter, precise in zip(rounded.parameters(), master.parameters(), strict=True):
                    narrow = vectors or precise.dim() > 1
                    parameter.data = precise.detach().to(torch.float32 if narrow else torch.float64)
                (loss_of(rounded, xs[i][rank::ranks], ys[i][rank::ranks]) / accumulate).backward()
                for parameter, precise in zip(rounded.parameters(), master.parameters(), strict=True):
                    precise.grad += parameter.grad.double() / ranks
        if clip is not None:
            nn.utils.clip_grad_norm_(master.parameters(), clip)
        optimizer.step()


def train(engine: Engine, optimizer: Any, steps: int, accumulate: int, clip: float | None) -> None:
    xs, ys = data(steps * accumulate, dist.get_world_size())
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            i = step * accumulate + micro
            loss = loss_of(engine.module, my_share(xs[i]), my_share(ys[i])) / accumulate
            with engine.no_sync() if micro < accumulate - 1 else contextlib.nullcontext():
                engine.backward(loss)
        if clip is not None:
            engine.clip_grad_norm_(optimizer, clip)
        optimizer.step()


def errors(row: str, accumulate: int, **options: Any) -> tuple[float, float]:
    """Of master values, before and after the end."""
    alone, module = build(Layers), build(Layers)
    train_alone(alone, 20, dist.get_world_size(), accumulate, clip=0.05, vectors=options.get("round_vectors", False))
    engine = Engine(module, row, param_dtype=torch.float32, bucket_cap_mb=0.0005, **options)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 20, accumulate, clip=0.05)
    within = relative_error(values(engine), alone.parameters())
    engine.close()
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    return within, relative_error(module.parameters(), alone.parameters())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("row", everyday(MIXED))
def test_master_values_are_those_of_a_single_process(ranks2: Ranks, row: str, accumulate: int) -> None:
    """Sent in double, so that gradients are not rounded once more than by autograd."""
    reduce = {} if row == "zero1" else {"reduce_dtype": torch.float64}
    for found in ranks2.run(errors, row, accumulate, **reduce):
        assert max(found) < EXACT


@pytest.mark.parametrize("row", everyday(MIXED))
def test_vectors_may_be_rounded_too(ranks2: Ranks, row: str) -> None:
    reduce = {} if row == "zero1" else {"reduce_dtype": torch.float64}
    for found in ranks2.run(errors, row, 2, round_vectors=True, **reduce):
        assert max(found) < EXACT


def frozen_and_thawed(row: str) -> list[Any]:
    module = build(Layers).float()
    before = [p.detach().clone() for p in module.blocks.parameters()]
    module.blocks.requires_grad_(False)
    engine = Engine(module, row, param_dtype=torch.bfloat16, round_vectors=True)
    optimizer = adamw(p for p in module.parameters() if p.requires_grad)
    engine.add_optimizer(optimizer)

    def step() -> set[torch.dtype]:
        optimizer.zero_grad()
        x, y = (part[0] for part in data(1, 1))
        with engine.forward_context():
            loss = loss_of(module, x, y)
            seen = {p.dtype for p in module.parameters()}
        engine.backward(loss)
        optimizer.step()
        return seen

    dtypes = step()
    with engine.full_parameters():
        same = all(torch.equal(a, b) for a, b in zip(module.blocks.parameters(), before, strict=True))
        precise = {p.dtype for p in module.parameters()}
    module.blocks.requires_grad_(True)
    optimizer.add_param_group({"params": list(module.blocks.parameters())})
    dtypes |= step()
    engine.close()
    trained = not any(torch.equal(a, b) for a, b in zip(module.blocks.parameters(), before, strict=True))
    return [dtypes, precise, same, trained]


@pytest.mark.parametrize("row", everyday(MIXED))
def test_frozen_parameters_are_rounded_where_vectors_are(ranks2: Ranks, row: str) -> None:
    expected = [{torch.bfloat16}, {torch.float32}, True, True]
    assert ranks2.run(frozen_and_thawed, row) == [expected] * 2


def through_messages(kind: type, row: str) -> tuple[float, float]:
    def connect(device: torch.device, group: Any = None) -> Any:
        return kind(device, group, group)

    with (
        mock.patch("lightning_accel.core.agreement.connect", connect),
        mock.patch("lightning_accel.core.mesh.connect", connect),
    ):
        return errors(row, 2, reduce_dtype=torch.float64)


@pytest.mark.parametrize("kind", [GlooCollectives, pytest.param(TorchCollectives, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("row", [pytest.param("zero2", marks=pytest.mark.matrix), "fsdp"])
def test_by_messages(ranks3: Ranks, kind: type, row: str) -> None:
    for found in ranks3.run(through_messages, kind, row):
        assert max(found) < EXACT


@pytest.mark.matrix
@pytest.mark.parametrize("options", [{"offload": "parameters"}, {"units": [Affine]}, {}], ids=["offload", "units", ""])
def test_with_other_settings(ranks3: Ranks, options: dict[str, Any]) -> None:
    for found in ranks3.run(errors, "fsdp", 2, reduce_dtype=torch.float64, **options):
        assert max(found) < EXACT


@pytest.mark.matrix
def test_several_copies(ranks_of: Any) -> None:
    for found in ranks_of(4).run(errors, "fsdp_hybrid", 2, reduce_dtype=torch.float64, shard_size=2):
        assert max(found) < EXACT


def rounded_sum() -> tuple[Tensor, Tensor]:
    """bf16 travels, and is added up in fp32."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layout = even_layout([(64,)], ranks)
    generator = torch.Generator().manual_seed(0)
    everyone = torch.randn(ranks, layout.total, generator=generator).bfloat16()
    expected = everyone.float().sum(0)[slice(*layout.part(rank))]
    found = []
    for kind in (
        connect,
        lambda device: GlooCollectives(device, None, None),
        lambda d: TorchCollectives(d, None, None),
    ):
        collectives = kind(torch.device("cpu"))
        out = torch.empty(expected.numel())
        collectives.reduce_scatter(everyone[rank].clone(), layout, out).wait()
        found.append(out)
        sent = collectives.traffic.bytes_sent["reduce_scatter"]
        assert sent == 2 * (layout.total - out.numel())
        collectives.close()
    return torch.stack(found), expected.expand(3, -1)


@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_gradients_travel_narrow_and_are_added_up_wide(world: Ranks) -> None:
    for found, expected in world.run(rounded_sum):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # fp32 sums of three, in any order


# Each gradient is rounded to 24 bits before it is sent; steps of SGD add up some of these errors.
SINGLE = 8 * 2.0**-24


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("row", everyday(["zero2", "fsdp", "fsdp_partial"]))
def test_gradients_alone_may_travel_narrow(ranks2: Ranks, row: str, accumulate: int) -> None:
    options = {"make_optimizer": sgd, "reduce_dtype": torch.float32, "accumulate": accumulate}
    assert all(0 < error < SINGLE for error in ranks2.run(compare, Net, row, **options))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def measured(row: str, dtype: torch.dtype | None) -> Any:
    torch.manual_seed(0)
    module = Plain()
    engine = Engine(module, row, param_dtype=dtype, bucket_cap_mb=0.001)
    optimizer = torch.optim.Adam(module.parameters())
    engine.add_optimizer(optimizer)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(torch.randn(8, 64, generator=generator)).square().mean()
        engine.backward(loss)
        optimizer.step()
    report = engine.report()
    matrices = sum(p.numel() for p in module.parameters() if p.dim() > 1)
    vectors = sum(p.numel() for p in module.parameters() if p.dim() < 2)
    engine.close()
    return report, matrices, vectors


@pytest.mark.parametrize("row", everyday(MIXED))
def test_bytes_at_rest_and_on_the_wire(ranks2: Ranks, row: str) -> None:
    for report, matrices, vectors in ranks2.run(measured, row, torch.bfloat16):
        ranks, placement = 2, find_row(row)
        rests = placement.parameters.fraction(ranks)
        padding = 2 * 4 * 16 * len(report.at_rest) * 16  # of some units, in each kind of state
        expected = {
            "parameters": rests * (2 * matrices + 4 * vectors),
            "master_parameters": 4 * matrices / ranks,
            "gradients": 4 * (matrices + vectors) * placement.accumulating.fraction(ranks),
            "optimizer_state": 8 * (matrices + vectors) / ranks,
        }
        for kind, size in expected.items():
            assert size <= report.at_rest[kind] + padding
            assert report.at_rest[kind] <= 1.01 * size + padding
        part = (ranks - 1) / ranks
        gathers = 1 if placement.computing is Rest.REPLICATED else 2
        gathered = gathers * part * (2 * matrices + 4 * vectors)
        narrow = 2 if placement.accumulating is Rest.SHARDED else 4  # what is added up on each rank is wide
        reduced = part * (narrow * matrices + 4 * vectors)
        assert report.bytes_sent["all_gather"] == pytest.approx(gathered, rel=0.01)
        assert report.bytes_sent["reduce_scatter"] == pytest.approx(reduced, rel=0.01)


def looked_at(row: str) -> list[Any]:
    """Whole parameters are master values, also those that are written."""
    module = build(Layers)
    engine = Engine(module, row, param_dtype=torch.float32)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 2, 1, None)
    before = values(engine)
    with engine.full_parameters(writeback=True), engine.full_parameters():
        dtypes = {p.dtype for p in module.parameters()}
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1e-12)
    after = values(engine)
    kept = all(torch.equal(a, b + 1e-12) for a, b in zip(after, before, strict=True))
    with torch.no_grad(), engine.forward_context():
        seen = {p.dtype for p in module.parameters() if p.dim() > 1}
    engine.backward(loss_of(module, *[part[0] for part in data(1, 1)]))
    with pytest.raises(RuntimeError, match=r"which rests sharded"):
        module.first.weight.grad.sum()
    gradient = engine.full_gradient(module.first.weight)
    copied = copy.deepcopy(module) if row == "zero2" else None
    engine.close()
    return [dtypes, seen, kept, gradient.dtype, copied is None or next(copied.parameters()).dtype]


@pytest.mark.parametrize("row", everyday(MIXED))
def test_whole_parameters_are_master_values(ranks2: Ranks, row: str) -> None:
    for dtypes, seen, kept, gradient, _ in ranks2.run(looked_at, row):
        assert dtypes == {torch.float64}
        assert seen == {torch.float32}
        assert kept
        assert gradient is torch.float64


def stepped_within(row: str, writeback: bool) -> tuple[float, float, float]:
    """A step within ``full_parameters`` starts from what was changed there to be kept."""
    results = []
    for within in (True, False):
        module = build(Layers)
        engine = Engine(module, row, param_dtype=torch.float32)
        optimizer = adamw(module.parameters())
        engine.add_optimizer(optimizer)
        engine.backward(loss_of(module, *[part[0] for part in data(1, 1)]))
        with engine.full_parameters(writeback=writeback):
            if writeback:
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.mul_(1.5)
            if within:
                optimizer.step()
                seen = [p.detach().clone() for p in module.parameters()]
        if not within:
            optimizer.step()
        with torch.no_grad(), engine.forward_context():
            output = module(data(1, 1)[0][0])
        results.append((values(engine), output))
        engine.close()
    (ours, one), (expected, other) = results
    return relative_error(ours, expected), relative_error(seen, expected), float((one - other).abs().max())


@pytest.mark.parametrize("writeback", [False, True])
@pytest.mark.parametrize("row", everyday(MIXED))
def test_a_step_within_full_parameters(ranks2: Ranks, row: str, writeback: bool) -> None:
    assert ranks2.run(stepped_within, row, writeback) == [(0.0, 0.0, 0.0)] * 2


def on_meta(row: str) -> tuple[float, bool]:
    torch.manual_seed(0)
    whole = Layers()
    with torch.device("meta"):
        module = Layers()
    torch.manual_seed(0)
    engine = Engine(module, row, param_dtype=torch.bfloat16)
    engine.add_optimizer(adamw(module.parameters()))
    engine.build()
    error = relative_error(values(engine), whole.parameters())
    narrow = {p.dtype for p in module.parameters()} == {torch.bfloat16, torch.float32}
    engine.close()
    return error, narrow


@pytest.mark.parametrize("row", everyday(MIXED))
def test_models_on_the_meta_device_have_precise_master_values(ranks2: Ranks, row: str) -> None:
    assert ranks2.run(on_meta, row) == [(0.0, True)] * 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.bags = nn.EmbeddingBag(11, 6)
        self.norm = nn.LayerNorm((3, 2))
        self.inner = nn.Linear(6, 6)
        self.last = nn.Linear(6, 11, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x[:, 0]) + self.bags(x)
        return self.last(self.inner(self.norm(x.unflatten(1, (3, 2))).flatten(1)))


def looked_up(row: str) -> list[Any]:
    module = build(Tied, torch.float32)
    engine = Engine(module, row, param_dtype=torch.bfloat16)
    engine.add_optimizer(sgd(module.parameters()))
    with engine.forward_context(), torch.autocast("cpu", torch.bfloat16):
        dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
        found = module.embedding(torch.arange(3)).dtype, module(torch.arange(6).view(3, 2)).dtype
    engine.close()
    return [dtypes, *found]


@pytest.mark.parametrize("row", everyday(MIXED))
def test_what_autocast_would_not_round_stays_precise(ranks2: Ranks, row: str) -> None:
    wide, narrow = torch.float32, torch.bfloat16
    names = dict.fromkeys(["embedding.weight", "bags.weight", "norm.weight", "norm.bias", "inner.bias"], wide)
    names["inner.weight"] = narrow
    assert ranks2.run(looked_up, row) == [[names, wide, narrow]] * 2


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected param_dtype to be a floating-point dtype, got torch.int8"):
        Dtypes.checked(torch.int8, None, find_row("zero2"))
    with pytest.raises(ValueError, match="Expected param_dtype for rows that shard optimizer state only"):
        Dtypes.checked(torch.bfloat16, None, find_row("ddp"))
    with pytest.raises(ValueError, match="Expected reduce_dtype to be a floating-point dtype, got torch.int8"):
        Dtypes.checked(None, torch.int8, find_row("zero1"))


def with_narrow_gradients(row: str) -> tuple[float, int, int]:
    alone, module = build(Layers), build(Layers)
    train_alone(alone, 20, dist.get_world_size(), 3, clip=0.05, vectors=True)
    options: dict[str, Any] = {"param_dtype": torch.float32, "round_vectors": True, "bucket_cap_mb": 0.0005}
    engine = Engine(module, row, grad_dtype=torch.float32, **options)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 20, 3, clip=0.05)
    narrow = engine.report().at_rest["gradients"]
    within = relative_error(values(engine), alone.parameters())
    engine.close()
    wide = Engine(module, row, **options)
    again = adamw(module.parameters())
    wide.add_optimizer(again)
    train(wide, again, 1, 3, clip=None)
    size = wide.report().at_rest["gradients"]
    wide.close()
    return within, narrow, size


@pytest.mark.parametrize("row", everyday(MIXED))
def test_gradients_may_rest_in_what_they_are_computed_in(ranks2: Ranks, row: str) -> None:
    for within, narrow, wide in ranks2.run(with_narrow_gradients, row):
        assert EXACT < within < 1e-4  # fp32 rounds sums of gradients, and nothing else does
        assert 2 * narrow == wide > 0


def test_narrow_gradients_are_of_rounded_parameters() -> None:
    with pytest.raises(ValueError, match="grad_dtype together with param_dtype only, got torch.bfloat16"):
        Dtypes.checked(None, None, find_row("zero2"), grad=torch.bfloat16)
    with pytest.raises(ValueError, match="Expected grad_dtype to be a floating-point dtype, got torch.int8"):
        Dtypes.checked(torch.bfloat16, None, find_row("zero2"), grad=torch.int8)
