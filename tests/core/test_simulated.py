"""The engine among ranks that are not there, on tensors without memory."""

from __future__ import annotations

import contextlib
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from core.toys import Net
from harness import Ranks
from lightning_accel.core import Engine, Report
from lightning_accel.core.absent import AbsentParameter
from lightning_accel.core.memory import watched
from lightning_accel.core.placement import find_row
from lightning_accel.core.simulated import SimulatedCollectives, simulated

ROW_NAMES = ["ddp", "zero1", "zero2", "fsdp", "fsdp_partial", "fsdp_hybrid"]
WIDTH, BLOCKS, STEPS = 37, 4, 3
WIDE = 4000
"""So that what is padded for 1,024 ranks is next to nothing."""


def trained(row: str, mixed: bool, shard_size: int | None = None, width: int = WIDTH) -> Report:
    """The report of an engine after some steps."""
    module = Net(width, BLOCKS)
    mixed = mixed and row != "ddp"
    engine = Engine(
        module,
        row,
        bucket_cap_mb=0.01 if width == WIDTH else 25.0,
        shard_size=shard_size,
        param_dtype=torch.bfloat16 if mixed else None,
    )
    optimizer = torch.optim.AdamW(module.parameters())
    engine.add_optimizer(optimizer)
    x = torch.zeros(5, 7)
    # However busy the machine: a rank that finds another late borrows more memory.
    with mock.patch("lightning_accel.core.reduction._PATIENCE_S", 60.0):
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
                loss = module(x).square().mean()
            engine.backward(loss)
            optimizer.step()
    report = engine.report()
    engine.close()
    return report


def simulated_report(ranks: int, row: str, mixed: bool, shard_size: int | None = None, width: int = WIDTH) -> Report:
    with simulated(ranks), FakeTensorMode():
        return trained(row, mixed, shard_size, width)


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "mixed"])
@pytest.mark.parametrize("row", ROW_NAMES)
def test_a_simulated_rank_allocates_and_sends_what_a_real_one_does(ranks2: Ranks, row: str, mixed: bool) -> None:
    real = ranks2.run(trained, row, mixed, 2 if row == "fsdp_hybrid" else None)[0].to_dict()
    found = simulated_report(2, row, mixed, 2 if row == "fsdp_hybrid" else None).to_dict()
    for told in (real, found):
        # How ranks agree on small things depends on how they are connected.
        told["collectives"].pop("agree", None)
        told["bytes_sent"].pop("agree", None)
    assert found == real
    assert found["at_rest"]["parameters"] > 0
    assert sum(found["bytes_sent"].values()) > 0


@pytest.mark.parametrize("ranks", [64, 1024])
@pytest.mark.parametrize("row", ROW_NAMES)
def test_many_ranks_are_as_theory_says(row: str, ranks: int) -> None:
    report = simulated_report(ranks, row, False, 8 if row == "fsdp_hybrid" else None, WIDE)
    with torch.device("meta"):
        module = Net(WIDE, BLOCKS)
    size, first, last = (4 * sum(p.numel() for p in part.parameters()) for part in (module, module.first, module.last))
    shard = report.shard_size
    assert shard == (8 if row == "fsdp_hybrid" else ranks)
    theory = find_row(row).rest_bytes(size, shard)
    for kind in ("parameters", "gradients", "optimizer_state"):
        assert theory[kind] <= report.at_rest[kind] <= 1.01 * theory[kind]
    sent = sum(size for kind, size in report.bytes_sent.items() if kind != "agree")
    expected = find_row(row).wire_bytes(size, shard, copies=ranks // shard)
    assert sent <= 1.01 * expected
    # Parameters that belong to no block are gathered once a step (here there are next to none).
    assert sent >= expected - first - last


def test_nothing_is_allocated_and_any_rank_can_be_simulated() -> None:
    parts = []
    for rank in (0, 5, 7):
        with simulated(8, rank), FakeTensorMode():
            module = torch.nn.Linear(2**18, 2**18)  # 256 GiB
            engine = Engine(module, "fsdp")
            engine.build()
            assert isinstance(engine.collectives, SimulatedCollectives)
            assert isinstance(module.weight, AbsentParameter)
            assert isinstance(module.weight, FakeTensor)
            parts.append((engine.collectives.rank, engine.units[0].part))
            engine.close()
            assert type(module.weight) is FakeTensor
    assert [rank for rank, _ in parts] == [0, 5, 7]
    assert len({part for _, part in parts}) == 3


def in_a_real_group() -> tuple[float, int, bool]:
    """A simulation in the middle of a real run."""
    before = dist.group.WORLD
    simulated_report(64, "fsdp", mixed=False)
    with contextlib.suppress(ZeroDivisionError), simulated(16):
        assert dist.get_world_size() == 16
        raise ZeroDivisionError
    tensor = torch.ones(())
    dist.all_reduce(tensor)
    return tensor.item(), dist.get_world_size(), dist.group.WORLD is before


def test_real_groups_are_as_before_afterwards(ranks2: Ranks) -> None:
    assert ranks2.run(in_a_real_group) == [(2.0, 2, True)] * 2
    assert not dist.is_initialized()


def test_watchers_are_told_of_the_engines_buffers() -> None:
    told: list[tuple[int, str]] = []
    with simulated(2), FakeTensorMode(), watched(lambda tensor, purpose: told.append((tensor.numel(), purpose))):
        trained("fsdp", mixed=True)
    assert {purpose for _, purpose in told} == {"parameters", "master_parameters", "gathered", "gradients"}
    count = len(told)
    with simulated(2), FakeTensorMode():
        trained("fsdp", mixed=True)
    assert len(told) == count
