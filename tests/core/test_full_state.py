"""Rank 0 alone has whole parameters to save: what it gets, what the others send, and what that takes in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.test_live_memory import BLOCKS, LINEARS, Deep, unit_bytes
from core.test_lockstep import sending_messages
from core.toys import (
    Net,
    Tanh,
    adamw,
    build,
    live_bytes,
    mse,
    prepared,
    relative_error,
    started,
    train,
    values,
)
from harness import Ranks
from lightning_accel.core import Engine, full_state
from lightning_accel.core.absent import AbsentParameter
from lightning_accel.core.collectives import nbytes
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.torch_collectives import TorchCollectives

SHARDED = ["fsdp", "fsdp_partial"]
OPTIONS = pytest.mark.parametrize("options", [{}, {"param_dtype": torch.bfloat16}], ids=["one dtype", "master values"])


class Peculiar(Net):
    """A state that is more than its parameters: buffers, hooks, names of its own, tied and frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.wide = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.tied = nn.Linear(13, 7, bias=False)
        self.tied.weight = nn.Parameter(self.first.weight.detach().t().clone())
        self.again = self.tied.weight
        self.register_buffer("mean", torch.arange(3.0))
        self.register_buffer("scratch", torch.ones(5), persistent=False)
        self.register_state_dict_post_hook(_add_sum)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, object]:
        state = super().state_dict(*args, **kwargs)
        state["renamed.bias"] = state.pop("last.bias")
        return state


def _add_sum(module: nn.Module, state: dict[str, object], prefix: str, _: object) -> None:
    state[f"{prefix}sum"] = module.first.weight.sum()


def rounded_mse(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Where some parameters may be rounded."""
    with torch.autocast("cpu", torch.bfloat16):
        return mse(module, x, y)


def state_of(engine: Engine) -> tuple[dict[str, object], bool]:
    with engine.collected_parameters() as is_whole:
        state = engine.module.state_dict()
    return state, is_whole


def save(row: str, make: Callable[[], nn.Module], kind: type | None = None, **options: object) -> bool:
    """Whether this rank had the values; they were compared with those that ``full_parameters`` shows."""
    module = build(make, torch.float32)
    with sending_messages(kind) if kind else mock.patch.dict({}):
        engine = Engine(module, row, **options)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
        engine.add_optimizer(optimizer)
        engine.build()
    for _ in range(2):
        train(engine, optimizer, 2, rounded_mse)
        with engine.full_parameters():
            expected = {
                name: value.detach().clone() if isinstance(value, Tensor) else value
                for name, value in module.state_dict().items()
            }
        state, is_whole = state_of(engine)
        assert list(state) == list(expected), "the same names in the same order"
        for name, value in expected.items():
            if is_whole and isinstance(value, Tensor):
                assert state[name].dtype == value.dtype
                assert state[name].stride() == value.stride()
                assert torch.equal(state[name], value), name
            elif is_whole:
                assert state[name] == value
        collected = any(unit.memory.is_sharded or unit.memory.has_master for unit in engine.units)
        assert is_whole == (dist.get_rank() == 0 or not collected)
        if make is Peculiar:
            assert "scratch" not in state
            assert state["tied.weight"].data_ptr() == state["again"].data_ptr()
            if not collected:
                assert state["first.weight"].data_ptr() == module.first.weight.data_ptr(), "no copy"
        if row in SHARDED:
            assert all(isinstance(parameter, AbsentParameter) for parameter in module.parameters())
    engine.close()
    return is_whole


@OPTIONS
@pytest.mark.parametrize("row", ["ddp", "zero2", *SHARDED])
def test_the_state_is_that_of_whole_parameters(ranks3: Ranks, row: str, options: dict[str, object]) -> None:
    if row == "ddp" and options:
        pytest.skip("has no master values")
    replicated = row in ("ddp", "zero2") and not options
    assert ranks3.run(save, row, Peculiar, **options) == [True, replicated, replicated]


@pytest.mark.parametrize("kind", [GlooCollectives, TorchCollectives])
def test_by_messages(ranks3: Ranks, kind: type) -> None:
    assert ranks3.run(save, "fsdp", Net, kind) == [True, False, False]


def save_owned() -> list[bool]:
    """With an optimizer that needs whole tensors, and before there is any optimizer at all."""
    engine = Engine(Net(), "fsdp")
    _, before = state_of(engine)
    engine.close()
    engine, optimizer = started("fsdp", Net, torch.optim.Adafactor)
    train(engine, optimizer, 2)
    expected = values(engine)
    state, after = state_of(engine)
    if after:
        assert relative_error(state.values(), expected) == 0
    engine.close()
    return [before, after]


@pytest.mark.filterwarnings("ignore")
def test_owned_tensors_and_no_optimizer(ranks2: Ranks) -> None:
    assert ranks2.run(save_owned) == [[True, True], [False, False]]


def save_within(row: str, **options: object) -> float:
    """Error of what is saved within ``full_parameters``, where values were changed before."""
    module = build(Net, torch.float32)
    engine = Engine(module, row, **options)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 1, rounded_mse)
    error = 0.0
    with engine.full_parameters(writeback=True):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        expected = [parameter.detach().clone() for parameter in module.parameters()]
        state, is_whole = state_of(engine)
        assert relative_error(module.parameters(), expected) == 0, "they are shown as before"
        if is_whole:
            error = relative_error(state.values(), expected)
    train(engine, optimizer, 1, rounded_mse)
    engine.close()
    return error


@OPTIONS
@pytest.mark.parametrize("row", ["zero2", "fsdp"])
def test_within_full_parameters_what_is_shown_is_saved(ranks2: Ranks, row: str, options: dict[str, object]) -> None:
    assert ranks2.run(save_within, row, **options) == [0, 0]


class Saving(Tanh):
    engine: Engine

    def forward(self, x: Tensor) -> Tensor:
        with self.engine.collected_parameters():
            raise AssertionError("it has to be refused")


def save_in_forward() -> None:
    module = nn.Sequential(Tanh(7), Saving(7))
    engine = Engine(module, "fsdp", units=[Tanh])
    object.__setattr__(module[1], "engine", engine)
    with pytest.raises(RuntimeError, match=r"Expected collected_parameters\(\) to be used between steps"):
        module(torch.ones(1, 7))
    engine.close(abandon=True)


def test_within_forward_it_is_refused(ranks2: Ranks) -> None:
    ranks2.run(save_in_forward)


def fail_within() -> float:
    engine, optimizer = prepared("fsdp")
    train(engine, optimizer, 1)
    expected = values(engine)
    with pytest.raises(LookupError), engine.collected_parameters():
        raise LookupError
    error = relative_error(values(engine), expected)
    train(engine, optimizer, 1)
    engine.close()
    return error


def test_an_error_in_state_dict_leaves_the_model_as_it_was(ranks2: Ranks) -> None:
    assert ranks2.run(fail_within) == [0, 0]


def sent(row: str, **options: object) -> tuple[dict[str, int], int, int]:
    """What one save sends by kind, the bytes of this rank's part of the parameters, and of all of them."""
    engine, optimizer = prepared(row, **options)
    train(engine, optimizer, 1)
    engine.wait()
    engine.collectives.traffic.take()
    state_of(engine)
    _, counted = engine.collectives.traffic.take()
    mine = sum(
        (piece.stop - piece.start) * unit.memory.mine.element_size()
        for unit in engine.units
        for piece in unit.layout.pieces(*unit.part)
    )
    whole = sum(map(nbytes, engine.module.parameters()))
    engine.close()
    return counted, mine, whole


@pytest.mark.parametrize("row", ["zero2", "fsdp"])
def test_each_part_is_sent_once(ranks3: Ranks, row: str) -> None:
    found = ranks3.run(sent, row)
    for rank, (counted, mine, whole) in enumerate(found):
        if row == "fsdp":
            assert counted == {"gather": mine if rank else 0}, "padding is not sent, and nobody else gets anything"
            assert sum(part for _, part, _ in found) == whole
        else:
            assert counted == {}


def test_other_copies_of_the_state_send_nothing(ranks_of: Callable[[int], Ranks]) -> None:
    found = ranks_of(4).run(sent, "fsdp_hybrid", shard_size=2)
    assert [counted for counted, _, _ in found] == [{"gather": 0}, {"gather": found[1][1]}, {}, {}]


def watched(width: int) -> tuple[int, int, int]:
    """Live bytes while a state is collected, above those before: at most, when it is there, and afterwards."""
    module = Deep(width)
    engine = Engine(module, "fsdp", bucket_cap_mb=0.001)
    engine.add_optimizer(torch.optim.Adam(module.parameters()))
    engine.build()
    gc.collect()
    before, peak = live_bytes(), 0
    put_together = full_state.put_together

    def watch(*args: object) -> Tensor | None:
        nonlocal peak
        whole = put_together(*args)
        peak = max(peak, live_bytes() - before)
        return whole

    with mock.patch.object(full_state, "put_together", watch):
        state, _ = state_of(engine)
    there = live_bytes() - before
    state.clear()
    gc.collect()
    after = live_bytes() - before
    engine.close()
    return peak, there, after


@pytest.mark.parametrize("width", [128, 125], ids=["no padding", "padding"])
def test_rank_0_has_the_model_and_the_others_nothing(ranks2: Ranks, width: int) -> None:
    model, small = BLOCKS * unit_bytes(width), 4096
    (peak, there, after), (other_peak, other_there, other_after) = ranks2.run(watched, width)
    # Small tensors that were there before may be gone: of agreements with other ranks that were still under way.
    assert abs(there - model) < small
    assert peak < model + small, "tensors are put together where they stay"
    for nothing in (after, other_peak, other_there, other_after):
        assert nothing < small
    assert small < 4 * width * width < model / LINEARS, "a tensor more would be seen"
