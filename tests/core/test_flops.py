"""Floating-point operations of a step, by module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from core.toys import Net, adamw, build, prepared, train
from harness import Ranks
from lightning_accel.core import Engine
from lightning_accel.core.flops import FlopCount
from lightning_accel.core.flops_table import Flops, ModuleFlops
from lightning_accel.core.recompute import recompute
from lightning_accel.core.watching import BACKWARD, FORWARD
from rows import everyday

SAMPLES = 2  # of a rank
WIDTH = 13
FIRST, BLOCK, LAST = (2 * SAMPLES * size for size in (7 * WIDTH, WIDTH * WIDTH, WIDTH * 3))
"""Operations of each layer's forward: a product and a sum for each weight and sample."""


def counted(row: str, *, micro_batches: int = 1, after: int = 1, again: bool = False) -> tuple[list[Flops], int]:
    engine, optimizer = prepared(row)
    if again:
        recompute(engine.blocks.values())
    found: list[Flops] = []
    engine.phases.add(FlopCount(engine, found.append, after=after))
    engine.build()
    for _ in range(4):
        optimizer.zero_grad()
        for micro in range(micro_batches):
            x = torch.ones(SAMPLES, 7, dtype=torch.float64)
            if micro < micro_batches - 1:
                with engine.no_sync():
                    engine.backward(engine.module(x).square().mean())
            else:
                engine.backward(engine.module(x).square().mean())
        optimizer.step()
    return found, len(engine.module._forward_pre_hooks)


def by_name(flops: Flops) -> dict[str, tuple[int, int, int]]:
    return {module.name: (module.parameters, module.forward, module.backward) for module in flops.modules}


@pytest.mark.parametrize("row", everyday(["ddp", "zero1", "zero2", "fsdp", "fsdp_partial"]))
def test_a_network_of_linear_layers(ranks2: Ranks, row: str) -> None:
    plain, _ = counted_alone()
    for rank, (found, hooks) in enumerate(ranks2.run(counted, row, micro_batches=2)):
        (flops,) = found
        assert (flops.step, flops.rank, flops.ranks, flops.micro_batches) == (2, rank, 2, 2)
        told = by_name(flops)
        # Backward takes two products for each of forward; of the first layer one, as nobody asks for its input's.
        assert told["first"] == (8 * WIDTH, 2 * FIRST, 2 * FIRST)
        for index in range(3):
            for name in (f"blocks.{index}", f"blocks.{index}.linear"):
                assert told[name] == ((WIDTH + 1) * WIDTH, 2 * BLOCK, 4 * BLOCK)
        assert told["last"] == ((WIDTH + 1) * 3, 2 * LAST, 4 * LAST)
        forward = 2 * (FIRST + 3 * BLOCK + LAST)
        assert told[""] == (plain, forward, 2 * forward - 2 * FIRST)
        assert all(time >= 0 for time in flops.times_ms.values())
        assert flops.times_ms[FORWARD] > 0
        assert flops.times_ms[BACKWARD] > 0
        speed = flops.per_second
        assert speed["forward"] == pytest.approx(1e3 * forward / flops.times_ms[FORWARD])
        assert 0 < speed["step"] < speed["forward"] + speed["backward"]
        assert hooks <= 2  # the engine's own


def counted_alone() -> tuple[int, nn.Module]:
    module = build(Net)
    return sum(parameter.numel() for parameter in module.parameters()), module


def test_what_is_computed_again_counts(ranks2: Ranks) -> None:
    for found, _ in ranks2.run(counted, "fsdp", again=True):
        told = by_name(found[0])
        assert told["blocks.1"][1:] == (BLOCK, 3 * BLOCK)
        assert told["last"][1:] == (LAST, 2 * LAST)


class Attention(nn.Module):
    """Of two heads of four, as a GPT's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.out = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def words() -> Flops:
    torch.manual_seed(0)
    module = Words()
    engine = Engine(module, "fsdp")
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    found: list[Flops] = []
    engine.phases.add(FlopCount(engine, found.append))
    for _ in range(2):
        engine.backward(module(torch.arange(6).view(1, 6)).logsumexp(-1).mean())
        optimizer.step()
    return found[0]


def test_a_small_gpt(ranks2: Ranks) -> None:
    tokens = 6
    for flops in ranks2.run(words):
        told = by_name(flops)
        whole = 88 + 2 * (8 * 24 + 8 * 8)
        projections = 2 * tokens * (8 * 24 + 8 * 8)
        attention = 2 * 2 * tokens * tokens * 8  # scores and their sums, of all pairs of tokens
        assert told["blocks.0"][:2] == (8 * 24 + 8 * 8, projections + attention)
        assert told["blocks.0.qkv"][1:] == (2 * tokens * 8 * 24, 2 * 2 * tokens * 8 * 24)
        head = 2 * tokens * 8 * 11
        assert told["head"] == (88, head, 2 * head)
        assert told[""][:2] == (whole, 2 * (projections + attention) + head)
        assert told["words"] == (88, 0, 0)


def closed_early() -> list[Flops]:
    engine, optimizer = prepared("zero2")
    found: list[Flops] = []
    engine.phases.add(FlopCount(engine, found.append))
    engine.phases.add(FlopCount(engine, found.append, after=5))
    train(engine, optimizer, 1)
    engine.close()
    return found


def test_an_engine_that_is_closed_shows_what_there_is(ranks2: Ranks) -> None:
    for found in ranks2.run(closed_early):
        (flops,) = found
        assert flops.model.forward > 0
        assert flops.per_second == {}
        assert "FLOPS" not in str(flops)


def within_a_forward() -> tuple[Flops, int]:
    """A step of its own for each of two losses, within one forward, as with manual optimization."""
    engine, optimizer = prepared("zero2")
    found: list[Flops] = []
    engine.phases.add(FlopCount(engine, found.append))
    for _ in range(3):
        with engine.forward_context():
            engine.backward(engine.module(torch.ones(SAMPLES, 7, dtype=torch.float64)).square().mean())
            optimizer.step()
    return found[0], len(found)


def test_steps_within_a_forward(ranks2: Ranks) -> None:
    for flops, shown in ranks2.run(within_a_forward):
        assert shown == 1
        forward = FIRST + 3 * BLOCK + LAST
        assert by_name(flops)[""][1:] == (forward, 2 * forward - FIRST)


def flops(**times: float) -> Flops:
    names: Any = [
        ("", 500, 1e9, 2e9),
        ("a", 400, 9e8, 18e8),
        ("a.x", 300, 8e8, 16e8),
        ("a.y", 100, 1e8, 2e8),
        ("b", 100, 1e8, 2e8),
    ]
    modules = [
        ModuleFlops(name=name, kind="Net" if not name else "Linear", parameters=p, forward=int(f), backward=int(b))
        for name, p, f, b in names
    ]
    return Flops(step=3, rank=0, ranks=2, micro_batches=1, modules=modules, times_ms=times)


def test_the_table() -> None:
    whole = flops(forward=10.0, backward=20.0, other=10.0).table(top=2)
    assert "1.00 G in 10.00 ms: 100.00 GFLOPS" in whole
    assert "3.00 G in 40.00 ms: 75.00 GFLOPS" in whole
    assert "1: a 2.70 G (400 parameters), b 300.00 M (100 parameters)" in whole
    rows = [line.split() for line in whole.splitlines()]
    assert ["y", "(Linear)", "100", "100.00", "M", "200.00", "M", "10.0%"] in rows
    short = flops().table(depth=1)
    assert "a.x" not in short
    assert "(Linear)" in short
    assert "FLOPS" not in short
    assert "(Linear)" not in flops().table(detailed=False)
    assert "2: a.x 2.40 G" in flops().table(detailed=False)


def test_what_is_no_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected after to be at least 0, got -1"):
        FlopCount(None, print, after=-1)  # type: ignore[arg-type]
