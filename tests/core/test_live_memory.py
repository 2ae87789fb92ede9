"""How much memory the tensors of a rank really take in each moment of a step."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from core.toys import live_bytes
from harness import Ranks
from lightning_accel.core import Engine
from lightning_accel.core.report import Report
from lightning_accel.core.unit import Unit

BLOCKS, LINEARS, STEPS = 8, 4, 5
SMALL = 2**15
"""More than the activations of one row of numbers (two for each linear layer), masks and scalars."""
MESSAGE = 1024
"""More than what the last messages between ranks may leave for a moment: gloo's thread lets go of a message (here at
most some flags, a byte for each parameter) after it has told that it arrived, on a busy machine long after."""
PADDED = 1.01
"""More than the size of a unit with its padding, over that without."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(LINEARS))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = x + torch.tanh(linear(x))
        return x


class Deep(nn.Module):
    """Equal blocks and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@dataclass
class Watch:
    """Live bytes above those before the model was there, at many moments of some steps."""

    started: int
    forward: list[list[int]]
    """By step: before and after each block."""
    backward: list[list[int]]
    """By step: around each write of an arriving gradient, and when the engine's backward has ended."""
    rested: list[int]
    """By step: after it."""
    gathered: list[int]
    """By step: bytes of gathered parameters after it."""
    counters: int
    """Bytes of the optimizer's step counts."""
    report: Report


def watched(row: str, width: int) -> Watch:
    gc.collect()
    x = torch.randn(1, width)
    before = live_bytes()
    module = Deep(width)
    engine = Engine(module, row, bucket_cap_mb=0.001)
    optimizer = torch.optim.Adam(module.parameters())
    engine.add_optimizer(optimizer)
    engine.build()
    gc.collect()
    forward: list[list[int]] = []
    backward: list[list[int]] = []

    def now() -> int:
        return live_bytes() - before

    seen = Watch(now(), forward, backward, [], [], 0, engine.report())
    for block in module.blocks:
        block.register_forward_pre_hook(lambda *_: forward[-1].append(now()))
        block.register_forward_hook(lambda *_: forward[-1].append(now()))
    write = Unit.write

    def watched_write(unit: Unit, position: int, gradient: Tensor) -> bool:
        backward[-1].append(now())
        ready = write(unit, position, gradient)
        backward[-1].append(now())
        return ready

    # A rank that finds another late borrows more: here none is, however busy the machine. And what others send is read
    # in chunks: smaller ones for these small units.
    with (
        mock.patch.object(Unit, "write", watched_write),
        mock.patch("lightning_accel.core.reduction._PATIENCE_S", 60.0),
        mock.patch("lightning_accel.core.direct._CHUNK_BYTES", 2**12),
    ):
        for _ in range(STEPS):
            forward.append([])
            backward.append([])
            loss = module(x).square().mean()
            engine.backward(loss)
            del loss
            backward[-1].append(now())
            optimizer.step()
            seen.rested.append(now())
            seen.gathered.append(engine._roster.gauge.now)
    state = [value for values in optimizer.state.values() for value in values.values()]
    seen.counters = sum(value.nbytes for value in state if value.dim() == 0)
    seen.report = engine.report()
    engine.close()
    return seen


def unit_bytes(width: int) -> int:
    return 4 * LINEARS * (width * width + width)


@pytest.fixture(scope="module", params=[128, 125], ids=["no padding", "padding"])
def width(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def watches(ranks2: Ranks, width: int) -> list[Watch]:
    return ranks2.run(watched, "fsdp", width)


def test_a_rank_rests_with_its_part_and_nothing_else(watches: list[Watch], width: int) -> None:
    parameters = BLOCKS * unit_bytes(width) // 4
    padding = [watch.report.padding for watch in watches]
    if width == 128:
        assert padding == [{"parameters": 0, "gradients": 0}] * 2
        for watch in watches:
            assert 0 <= watch.started - 4 * parameters / 2 < MESSAGE
            for rested in watch.rested:
                assert 0 <= rested - (16 * parameters / 2 + watch.counters) < MESSAGE
    else:
        assert sum(pad["parameters"] for pad in padding) > 0
        started = sum(watch.started for watch in watches) - sum(pad["parameters"] for pad in padding)
        assert 0 <= started - 4 * parameters < 2 * MESSAGE
        extra = sum(sum(pad.values()) for pad in padding) + sum(watch.counters for watch in watches)
        for step in range(STEPS):
            rested = sum(watch.rested[step] for watch in watches)
            assert 0 <= rested - (16 * parameters + extra) < 2 * MESSAGE
    # One step count for each run of parameters that the optimizer treats alike.
    assert all(watch.counters == 4 * BLOCKS for watch in watches)


def test_forward_has_two_units_of_parameters_at_most(watches: list[Watch], width: int) -> None:
    for watch in watches:
        resting = [watch.started, *watch.rested[:-1]]
        for step, (rest, seen) in enumerate(zip(resting, watch.forward, strict=True)):
            assert len(seen) == 2 * BLOCKS
            assert max(seen) <= rest + 2 * PADDED * unit_bytes(width) + SMALL
            # The next is gathered beside the one that computes, once the order is known.
            assert max(seen) > rest + (2 if step else 1) * unit_bytes(width)


def test_backward_has_two_units_of_parameters_and_two_of_gradients_at_most(watches: list[Watch], width: int) -> None:
    unit = unit_bytes(width)
    arriving = 4 * width * width  # what autograd has computed, on its way to the buffer
    for watch in watches:
        assert watch.report.gathered <= 2 * PADDED * unit
        assert watch.report.transient <= 2 * PADDED * unit
        resting = [watch.rested[0] / 2, *watch.rested[:-1]]  # at first no optimizer state yet
        for step, (rest, seen) in enumerate(zip(resting, watch.backward, strict=True)):
            assert len(seen) == 2 * 2 * LINEARS * BLOCKS + 1
            assert max(seen) <= rest + PADDED * 4 * unit + arriving + SMALL
            # One unit fills while another is reduced, and one is gathered while another computes.
            assert max(seen) > rest + (4 if step else 3) * unit
            *_, end = seen
            assert end <= rest + SMALL


def test_gathered_memory_is_free_between_steps(watches: list[Watch]) -> None:
    for watch in watches:
        assert watch.gathered == [0] * STEPS
        assert watch.report.gathered > 0
