"""A checkpoint that was saved under any row and number of ranks, loaded under any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.toys import EXACT, Net, build, mse, relative_error
from harness import Ranks
from lightning_accel.core import Engine
from lightning_accel.core.checkpoint import Saver, load, save
from lightning_accel.core.checkpoint.engine_state import load_model, model_shards, optimizer_shards
from lightning_accel.strategies.stock import whole

ROWS = ["ddp", "zero1", "zero2", "fsdp", "fsdp_partial", "fsdp_hybrid"]
SINGLE = ("single", 1)
GLOBAL_BATCH = 12  # one, two, three and four ranks have equal shares of it
BEFORE, AFTER = 5, 2  # steps before a checkpoint is saved, and after it was loaded
# EXACT: ranks add gradients up in another order than a single process; the states they start from are equal bit by bit.

State = dict[str, Any]


def cells(worlds: list[int], rows: list[str]) -> list[tuple[str, int]]:
    return [SINGLE, *((row, ranks) for ranks in worlds for row in rows)]


def new_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    first, *rest = module.parameters()
    return torch.optim.AdamW([{"params": rest, "lr": 0.01}, {"params": [first], "weight_decay": 0.1}], amsgrad=True)


def new_engine(row: str) -> tuple[nn.Module, torch.optim.Optimizer, Engine]:
    module = build(Net)
    # Two copies of the state where that is possible.
    ranks = dist.get_world_size()
    shard_size = (ranks // 2 if ranks % 2 == 0 else 1) if row == "fsdp_hybrid" else None
    engine = Engine(module, row, shard_size=shard_size)
    optimizer = new_optimizer(module)
    engine.add_optimizer(optimizer)
    engine.build()
    return module, optimizer, engine


def train(module: nn.Module, optimizer: torch.optim.Optimizer, engine: Engine | None, seed: int, steps: int) -> None:
    """Steps of two micro-batches each, clipped."""
    generator = torch.Generator().manual_seed(seed)
    ranks, rank = (1, 0) if engine is None else (dist.get_world_size(), dist.get_rank())
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(GLOBAL_BATCH, 7, generator=generator, dtype=torch.float64)[rank::ranks]
            y = torch.randn(GLOBAL_BATCH, 3, generator=generator, dtype=torch.float64)[rank::ranks]
            if engine is None:
                (mse(module, x, y) / 2).backward()
            else:
                with engine.forward_context():
                    loss = mse(module, x, y) / 2
                engine.backward(loss)
        if engine is None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        else:
            engine.clip_grad_norm_(optimizer, 0.5)
        optimizer.step()


def values(module: nn.Module, engine: Engine | None) -> dict[str, Tensor]:
    if engine is None:
        return {name: p.detach().clone() for name, p in module.named_parameters()}
    with engine.full_parameters():
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def state_of(optimizer: torch.optim.Optimizer) -> State:
    """By number of the parameter; nothing on ranks that have none of a sharded one."""
    return {number: dict(entry) for number, entry in optimizer.state_dict().get("state", {}).items()}


def write(rows: list[str], folder: Path) -> dict[str, tuple[dict[str, Tensor], State, dict[str, Tensor]]]:
    """Save under each row; what was saved, and what an uninterrupted run has some steps later."""
    found = {}
    for row in rows:
        module, optimizer, engine = new_engine(row)
        train(module, optimizer, engine, seed=1, steps=BEFORE)
        state = {"model": model_shards(engine), "optimizer": optimizer_shards(engine.find_optimizer(optimizer))}
        saver = Saver(engine.collectives.gather_objects, dist.get_rank())
        saver.save(folder / f"{row}-{dist.get_world_size()}", state)
        saved = values(module, engine), state_of(optimizer)
        train(module, optimizer, engine, seed=2, steps=AFTER)
        found[row] = (*saved, values(module, engine))
        engine.close()
    return found


def write_single(folder: Path) -> tuple[dict[str, Tensor], State, dict[str, Tensor]]:
    module = build(Net)
    optimizer = new_optimizer(module)
    train(module, optimizer, None, seed=1, steps=BEFORE)
    saved = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
    save(folder / "single-1", saved)
    before = (
        values(module, None),
        {number: {k: v.clone() for k, v in e.items()} for number, e in state_of(optimizer).items()},
    )
    train(module, optimizer, None, seed=2, steps=AFTER)
    return (*before, values(module, None))


Loaded = tuple[dict[str, Tensor], State, dict[str, Tensor]]


def read(row: str, sources: list[str], folder: Path) -> dict[str, Loaded]:
    """Load each source, over what the one before has left, and train on."""
    found = {}
    module, optimizer, engine = new_engine(row)
    for source in sources:
        nest = load(folder / source)
        load_model(module, nest["model"], engine=engine)
        optimizer.load_state_dict(nest["optimizer"])
        loaded = values(module, engine), state_of(optimizer)
        train(module, optimizer, engine, seed=2, steps=AFTER)
        found[source] = (*loaded, values(module, engine))
    engine.close()
    return found


def read_single(sources: list[str], folder: Path) -> dict[str, Loaded]:
    found = {}
    for source in sources:
        module = build(Net)
        optimizer = new_optimizer(module)
        nest = whole(load(folder / source))
        module.load_state_dict(nest["model"])
        optimizer.load_state_dict(nest["optimizer"])
        loaded = values(module, None), {n: {k: v.clone() for k, v in e.items()} for n, e in state_of(optimizer).items()}
        train(module, optimizer, None, seed=2, steps=AFTER)
        found[source] = (*loaded, values(module, None))
    return found


def compare(found: dict[str, Loaded], written: dict[str, Loaded]) -> None:
    for source, (model, state, later) in found.items():
        expected_model, expected_state, expected_later = written[source]
        for name, value in expected_model.items():
            assert torch.equal(model[name], value), (source, name)
        assert state.keys() == expected_state.keys(), source
        for number, entry in expected_state.items():
            assert state[number].keys() == entry.keys(), (source, number)
            for key, value in entry.items():
                assert torch.equal(torch.as_tensor(state[number][key]), torch.as_tensor(value)), (source, number, key)
        assert relative_error(later.values(), expected_later.values()) < EXACT, source


def check(ranks_of: Callable[[int], Ranks], worlds: list[int], rows: list[str], folder: Path) -> None:
    written = {"single-1": write_single(folder)}
    for world in worlds:
        on_rank_0 = ranks_of(world).run(write, rows, folder)[0]
        written |= {f"{row}-{world}": saved for row, saved in on_rank_0.items()}
    assert len(written) == len(cells(worlds, rows))
    compare(read_single(list(written), folder), written)
    for world in worlds:
        for row in rows:
            compare(ranks_of(world).run(read, row, list(written), folder)[0], written)


def test_checkpoints_load_under_other_rows(ranks_of: Callable[[int], Ranks], tmp_path: Path) -> None:
    check(ranks_of, [2], ["ddp", "zero2", "fsdp"], tmp_path)


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_checkpoints_load_under_all_rows_and_numbers_of_ranks(ranks_of: Callable[[int], Ranks], tmp_path: Path) -> None:
    check(ranks_of, [1, 2, 3, 4], ROWS, tmp_path)
