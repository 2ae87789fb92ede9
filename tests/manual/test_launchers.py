"""Ranks that are started from within a program."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_accel.core import Engine
from lightning_accel.manual.launchers import debug_launcher, notebook_launcher

kept: Any = None
NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "CUDA_VISIBLE_DEVICES",
    "ACCEL_CPU",
)


def meet(folder: str, value: float) -> None:
    dist.init_process_group("gloo")
    total = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    told = " ".join(os.environ.get(name, "none") for name in NAMES)
    Path(folder, f"{dist.get_rank()}").write_text(f"{told} {float(total)}")


def test_ranks_meet(tmp_path: Path) -> None:
    before = dict(os.environ)
    debug_launcher(meet, (str(tmp_path), 2.0))
    found = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert found == ["0 0 2 2 0 127.0.0.1  1 6.0", "1 1 2 2 0 127.0.0.1  1 6.0"]
    assert dict(os.environ) == before


def test_a_function_that_no_other_process_can_import(tmp_path: Path) -> None:
    """As a notebook's."""

    def train(name: str) -> None:
        (tmp_path / f"{name}{os.environ['RANK']}").touch()

    notebook_launcher(train, ("of ",), num_processes=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of 0", "of 1", "of 2"]


def test_ranks_of_the_second_machine(tmp_path: Path) -> None:
    def train() -> None:
        (tmp_path / " ".join(os.environ[name] for name in [*NAMES[:5], "MASTER_ADDR", "MASTER_PORT"])).touch()

    notebook_launcher(train, num_processes=2, num_nodes=2, node_rank=1, master_addr="10.0.0.1", use_port="29511")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "2 0 4 2 1 10.0.0.1 29511",
        "3 1 4 2 1 10.0.0.1 29511",
    ]


def fail(folder: str, how: str) -> None:
    Path(folder, f"{os.environ['RANK']} began").touch()
    if os.environ["RANK"] == "1":
        if how == "raise":
            raise ValueError("a mistake of the user's")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    Path(folder, "went on").touch()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"(?s)rank 1 of 2 has failed:.*in fail\n.*ValueError: a mistake of the user's"),
        ("kill", "rank 1 of 2 has ended with SIGKILL"),
    ],
)
def test_the_first_failure_is_shown_and_the_others_are_ended(tmp_path: Path, how: str, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        debug_launcher(fail, (str(tmp_path), how))
    assert time.monotonic() - begin < 30
    assert not (tmp_path / "went on").exists()


def test_what_follows_from_a_failure_is_not_shown_instead() -> None:
    def train() -> None:
        dist.init_process_group("gloo")
        if dist.get_rank() == 1:
            raise ValueError("the cause")
        dist.barrier()

    with pytest.raises(RuntimeError, match="ValueError: the cause"):
        debug_launcher(train)


def test_a_rank_that_is_done_waits_for_those_that_read_from_it() -> None:
    """It has a part of the parameters, which others fetch as they need them."""

    def train() -> None:
        global kept  # as in a notebook; else the engine would be gone with this function
        dist.init_process_group("gloo")
        kept = engine = Engine(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "fsdp")
        engine.add_optimizer(torch.optim.SGD(engine.module.parameters(), lr=0.1))
        engine.build()
        if dist.get_rank() == 1:
            time.sleep(0.5)
        with torch.no_grad():
            engine.module(torch.zeros(1, 64))

    debug_launcher(train)


def test_one_process_is_this_one() -> None:
    made: list[Any] = []
    assert notebook_launcher(lambda value: made.append(value) or len(made), (3,), num_processes=1) == 1  # type: ignore[func-returns-value]
    assert made == [3]


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="got num_processes=0"):
        notebook_launcher(print, num_processes=0)
    with pytest.raises(ValueError, match="node_rank=2, num_nodes=2"):
        notebook_launcher(print, num_processes=1, num_nodes=2, node_rank=2, use_port=1)
    with pytest.raises(ValueError, match="Expected use_port, the same on all machines"):
        notebook_launcher(print, num_processes=1, num_nodes=2)
    with pytest.raises(ValueError, match="got num_processes=0"):
        debug_launcher(print, num_processes=0)
