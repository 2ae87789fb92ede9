"""Ranks that gather by messages and do different things are told so, instead of waiting or of mixing values up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.toys import Net, adamw, build, data, relative_error, train, train_alone, values
from harness import Ranks
from lightning_accel.core import Engine
from lightning_accel.core.connecting import connect
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.lockstep import Lockstep
from lightning_accel.core.torch_collectives import TorchCollectives

KINDS = [GlooCollectives, TorchCollectives]
SOON_S = 30
"""Far below the process group's timeout, far above what telling takes."""


@contextmanager
def sending_messages(kind: type) -> Iterator[None]:
    """Within it, engines take the ranks for such that share no memory."""
    with mock.patch("lightning_accel.core.agreement.connect", lambda device, group=None: kind(device, group, group)):
        yield


def started(kind: type, module: nn.Module, row: str) -> tuple[Engine, torch.optim.Optimizer]:
    with sending_messages(kind):
        engine = Engine(module, row, bucket_cap_mb=0.0005)
        optimizer = adamw(module.parameters())
        engine.add_optimizer(optimizer)
        engine.build()
    return engine, optimizer


def caught(engine: Engine) -> str:
    """What ``engine.close()`` raises."""
    try:
        engine.close()
    except RuntimeError as error:
        return str(error)
    finally:
        engine.close(abandon=True)
    return ""


def evaluated_unevenly(kind: type, row: str) -> tuple[str, float]:
    engine, optimizer = started(kind, build(Net), row)
    train(engine, optimizer, 2)
    begin = time.monotonic()
    message = ""
    try:
        with torch.no_grad():
            for _ in range(2 + dist.get_rank()):
                engine.module(data(1, 1)[0][0])
    except RuntimeError as error:
        message = str(error)
    return message or caught(engine), time.monotonic() - begin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ["fsdp", pytest.param("fsdp_partial", marks=pytest.mark.matrix)])
def test_one_more_forward_on_one_rank(ranks2: Ranks, kind: type, row: str) -> None:
    for message, took in ranks2.run(evaluated_unevenly, kind, row):
        assert "Expected all ranks to do the same, but rank 0 came to the end and rank 1 to forward." in message
        assert "limit_predict_batches" in message
        assert took < SOON_S


def goes_on(kind: type) -> tuple[str, float, list[str]]:
    """What was raised before a forward, and the loss of a step after it beside the one that it should be."""
    alone = build(Net)
    train_alone(alone, adamw(alone.parameters()), 1, dist.get_world_size())
    engine, optimizer = started(kind, build(Net), "fsdp")
    message = ""
    try:
        if dist.get_rank() == 0:
            with torch.no_grad():
                engine.module(data(1, 1)[0][0])
        else:
            with engine.full_parameters():
                pass
    except RuntimeError as error:
        message = str(error)
    train(engine, optimizer, 1)
    with torch.no_grad():
        engine.module(data(1, 1)[0][0])
    there = [unit.memory.presence.name for unit in engine.units]
    error = relative_error(values(engine), alone.parameters())
    engine.close()
    return message, error, there


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_were_told_may_go_on(ranks2: Ranks, kind: type) -> None:
    for message, error, there in ranks2.run(goes_on, kind):
        assert "rank 0 came to forward and rank 1 to full_parameters()." in message
        assert error < 1e-12
        assert set(there) == {"AWAY"}


def beside_a_group_of_one_rank() -> int:
    dist.new_group([0], timeout=timedelta(seconds=5))
    engine, _ = started(TorchCollectives, build(Net), "fsdp")
    engine.close()
    return dist.get_rank()


def test_ranks_may_be_in_different_numbers_of_groups(ranks2: Ranks) -> None:
    assert ranks2.run(beside_a_group_of_one_rank) == [0, 1]


class Either(nn.Module):
    """Two experts of one size: each rank uses another one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(7, 7) for _ in range(2))
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts[dist.get_rank()](x))


def different_experts(kind: type) -> tuple[str, float]:
    module = build(Either)
    with sending_messages(kind):
        engine = Engine(module, "fsdp", units=[nn.Linear], bucket_cap_mb=1e-6)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    begin = time.monotonic()
    message = ""
    try:
        train(engine, optimizer, 1)
    except RuntimeError as error:
        message = str(error)
    engine.close(abandon=True)
    return message, time.monotonic() - begin


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_gather_different_units_of_one_size(ranks2: Ranks, kind: type) -> None:
    for message, took in ranks2.run(different_experts, kind):
        assert "before backward rank 0 gathered 'experts.0' where rank 1 gathered 'experts.1'" in message
        assert took < SOON_S


def trained(kind: type, row: str) -> tuple[float, int]:
    alone, module = build(Net), build(Net)
    train_alone(alone, adamw(alone.parameters()), 6, dist.get_world_size(), accumulate=2)
    engine, optimizer = started(kind, module, row)
    train(engine, optimizer, 6, accumulate=2)
    report = engine.report()
    error = relative_error(values(engine), alone.parameters())
    engine.close()
    return error, report.collectives["agree"]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_do_the_same_are_left_alone(ranks2: Ranks, kind: type) -> None:
    for error, operations in ranks2.run(trained, kind, "fsdp"):
        assert error < 1e-12
        # Of each of two micro-batches: forward, backward, what is trained and what was used. Then the update.
        assert operations == 2 * 4 + 1


def alone_at_the_gate() -> str:
    """One rank comes, the other does not."""
    device = torch.device("cpu")
    group = dist.new_group(timeout=timedelta(seconds=1))
    lockstep = Lockstep(GlooCollectives(device, group, group))
    message = ""
    if dist.get_rank() == 0:
        try:
            lockstep.enter("forward")
        except RuntimeError as error:
            message = str(error)
    dist.barrier()
    return message


def test_a_rank_that_does_not_come(ranks2: Ranks) -> None:
    message, _ = ranks2.run(alone_at_the_gate)
    assert "Expected all ranks to come to forward of a model whose parameters rest sharded; some did not" in message
    ranks2.close()  # a group of theirs is broken


def is_needed() -> list[bool]:
    direct = connect(torch.device("cpu"))
    messages = GlooCollectives(torch.device("cpu"), None, None)
    found = [Lockstep(direct).is_needed, Lockstep(messages).is_needed]
    found.append(Lockstep(messages, is_gathered=False).is_needed)
    direct.close()
    return found


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_where_it_is_needed(world: Ranks) -> None:
    ranks = world.run(is_needed)
    assert ranks == [[False, world.world_size > 1, False]] * world.world_size


def stepped_unevenly() -> str:
    module = build(Net)
    engine = Engine(module, "fsdp")
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 1)
    message = ""
    try:
        if dist.get_rank() == 0:
            optimizer.step()
    except RuntimeError as error:
        message = str(error)
    return message or caught(engine)


def test_one_more_step_where_ranks_share_memory(ranks2: Ranks) -> None:
    ours, theirs = ranks2.run(stepped_unevenly)
    assert "Expected rank 1 to come to an update as this one does; it came to the end." in ours
    assert "Expected rank 0 to come to the end as this one does; it came to an update." in theirs
