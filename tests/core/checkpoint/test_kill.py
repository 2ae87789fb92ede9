"""Runs that are killed while they save: what is there is whole, and training goes on from it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core.toys import Net, build, data, mse, my_share
from lightning_accel.core import Engine
from lightning_accel.core.checkpoint import Saver, StoredTensor, load
from lightning_accel.core.checkpoint.engine_state import load_model, model_shards, optimizer_shards
from lightning_accel.core.checkpoint.nest import mapped

RANKS = 2
ROW = "fsdp"


def train_and_save(rank: int, folder: Path, attempt: int) -> None:
    """Go on from the last checkpoint, and save after each step: over the last one, and under a name of its own."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store-{attempt}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    module = build(Net)
    engine = Engine(module, ROW)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    engine.add_optimizer(optimizer)
    engine.build()
    saver = Saver(engine.collectives.gather_objects, rank)
    step = 0
    if (folder / "saved" / "last").exists():
        nest = load(folder / "saved" / "last")
        load_model(module, nest["model"], engine=engine)
        optimizer.load_state_dict(nest["optimizer"])
        step = nest["step"]
    x, y = data(1, RANKS)
    while True:
        optimizer.zero_grad()
        with engine.forward_context():
            loss = mse(module, my_share(x[0]), my_share(y[0]))
        engine.backward(loss)
        optimizer.step()
        step += 1
        added = engine.find_optimizer(optimizer)
        for name in ("last", f"step-{step}"):
            state = {"model": model_shards(engine), "optimizer": optimizer_shards(added), "step": step}
            saver.save(folder / "saved" / name, state)
        if rank == 0:
            (folder / "steps").write_text(str(step))


def read_all(path: Path) -> int:
    """Read every tensor of a checkpoint; which step it is of."""
    nest = mapped(load(path), lambda tensor: tensor.full() if isinstance(tensor, StoredTensor) else tensor)
    assert len(nest["model"]) == 10
    assert all(torch.isfinite(value).all() for value in nest["model"].values())
    counts = {int(entry["step"]) for entry in nest["optimizer"]["state"].values()}
    assert counts == {nest["step"]}  # one moment's, whatever was being saved
    return int(nest["step"])


def kill_while_saving(folder: Path, kills: int, seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "lightning_accel.core.checkpoint"])
    (folder / "saved").mkdir()
    newest = 0
    for attempt in range(kills):
        steps = folder / "steps"
        steps.unlink(missing_ok=True)
        ranks = [context.Process(target=train_and_save, args=(rank, folder, attempt)) for rank in range(RANKS)]
        try:
            for rank in ranks:
                rank.start()
            deadline = time.monotonic() + 120
            while not steps.exists():  # what was loaded has been trained on
                assert all(rank.is_alive() for rank in ranks), "a run did not go on from what the last one has left"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.2))
            assert all(rank.is_alive() for rank in ranks)
        finally:
            for rank in chance.sample(ranks, RANKS):
                if rank.pid is not None:
                    with contextlib.suppress(ProcessLookupError):  # it has ended because the other one was killed
                        os.kill(rank.pid, signal.SIGKILL)
                    rank.join()
        found = {path.name: read_all(path) for path in (folder / "saved").iterdir() if not path.name.startswith(".")}
        assert found["last"] > newest, found
        assert all(step == int(name.removeprefix("step-")) for name, step in found.items() if name != "last")
        newest = found["last"]


def test_runs_killed_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 2, random.randrange(10**6))


@pytest.mark.matrix
@pytest.mark.timeout(600)
def test_fifty_runs_killed_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 50, random.randrange(10**6))
