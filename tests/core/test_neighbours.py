"""Connections between ranks of one machine."""

import os
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightning_accel.core import neighbours
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.groups import timeout_of
from lightning_accel.core.neighbours import Neighbours


def connected():
    return Neighbours.connect(GlooCollectives(torch.device("cpu"), None, None))


def conversation():
    others = connected()
    rank = dist.get_rank()
    told = [others.meet(100 * turn + rank, "a test") for turn in range(3)]
    others.close()
    return os.getpid(), others.pids, told


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
def test_every_rank_is_told_everyones_numbers_in_order(world):
    outcomes = world.run(conversation)
    for rank, (_, pids, told) in enumerate(outcomes):
        others = [other for other in range(len(outcomes)) if other != rank]
        assert pids == {other: outcomes[other][0] for other in others}
        assert told == [{other: 100 * turn + other for other in others} for turn in range(3)]


def left_alone():
    others, rank = connected(), dist.get_rank()
    begin = time.monotonic()
    if rank == 0:
        others.meet(0, "a test")
        others.close()
        return None, 0.0
    others.meet(0, "a test")  # said before it hung up: still arrives
    with pytest.raises(RuntimeError, match="rank 0 has ended") as caught:
        others.meet(1, "a test")
    return str(caught.value), time.monotonic() - begin


def test_whoever_waits_for_a_rank_that_hung_up_is_told(ranks2):
    (_, (message, took)) = ranks2.run(left_alone)
    assert "Connection closed by peer" in message
    assert took < 10


def at_odds():
    others, rank = connected(), dist.get_rank()
    with pytest.raises(RuntimeError) as caught:
        others.meet(0, f"step {rank}")
    others.close()
    return str(caught.value)


def test_ranks_that_do_different_things_are_told(ranks2):
    (ours, theirs) = ranks2.run(at_odds)
    assert "Expected rank 1 to come to step 0 as this one does; it came to step 1." in ours
    assert "Expected rank 0 to come to step 1 as this one does; it came to step 0." in theirs


def woken():
    others = connected()
    if dist.get_rank() == 1:
        dist.barrier()
        return "silent"
    seen = []

    def wait():
        try:
            others.meet(0, "a test")
        except RuntimeError as error:
            seen.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    others.close()
    thread.join(10)
    dist.barrier()
    return seen


def test_closing_wakes_up_a_thread_that_waits(ranks2):
    (seen, _) = ranks2.run(woken)
    assert len(seen) == 1


def patient():
    others = connected()
    if dist.get_rank() == 1:
        dist.barrier()
        return None
    impatient = Neighbours(others._lines, others.pids, timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match="rank 1 to answer within 0 s, the process group's timeout") as caught:
        impatient.meet(0, "a test")
    dist.barrier()
    return str(caught.value)


def test_a_rank_that_does_not_answer(ranks2):
    assert ranks2.run(patient)[0] is not None


def unconnected():
    if dist.get_rank() == 0:
        neighbours.sys = type("Elsewhere", (), {"platform": "darwin"})
    found = connected()
    neighbours.sys = __import__("sys")
    return found is None


def test_if_one_rank_cannot_none_does(ranks2):
    assert ranks2.run(unconnected) == [True, True]


def timeout():
    return timeout_of(None, torch.device("cpu"))


def test_the_timeout_is_the_process_groups(ranks2):
    assert len(set(ranks2.run(timeout))) == 1
