import ctypes
import gc
import os
import threading

import pytest
import torch
import torch.distributed as dist

from lightning_accel.core import direct
from lightning_accel.core.collectives import connect
from lightning_accel.core.direct import Worker
from lightning_accel.core.layout import even_layout


def chosen(forbid):
    if forbid and dist.get_rank() == 1:  # one rank may not: then none does
        direct._can_read = lambda *_: False
    return type(connect(torch.device("cpu"))).__name__


def test_ranks_of_one_machine_read_each_others_memory(ranks2):
    assert ranks2.run(chosen, False) == ["DirectCollectives"] * 2


def test_if_one_rank_may_not_read_all_send_messages(ranks2):
    assert ranks2.run(chosen, True) == ["GlooCollectives"] * 2
    ranks2.close()  # it was told so by changing a module


def profiled():
    collectives = connect(torch.device("cpu"))
    layout, buffer = even_layout([(64,)], collectives.ranks), torch.ones(64)
    names = set()
    for _ in range(20):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            buffer.mul_(2)
            under_way = [collectives.all_gather(buffer, layout) for _ in range(30)]
        names |= {event.name for event in profile.events()}  # while the thread works
        for pending in under_way:
            pending.wait()
    return "aten::mul_" in names


def test_a_profiler_may_run(ranks2):
    """torch's works are not safe to use from a second thread then. See [Note: no blocking in C++]."""
    assert ranks2.run(profiled) == [True, True]


def test_reading_ones_own_memory():
    source, target = torch.arange(1000.0), torch.zeros(500)
    direct.read_memory(os.getpid(), source.data_ptr() + 400, target)
    assert torch.equal(target, source[100:600])


def test_reading_where_nothing_is_or_of_a_process_that_is_gone():
    target = torch.zeros(4)
    with pytest.raises(OSError, match="reading the memory of process"):
        direct.read_memory(os.getpid(), 8, target)
    with pytest.raises(OSError, match="No such process"):
        direct.read_memory(2**22 - 1, ctypes.addressof(ctypes.c_int()), target)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "lightning-accel"]


def used_and_dropped():
    collectives = connect(torch.device("cpu"))
    layout, buffer = even_layout([(64,)], collectives.ranks), torch.ones(64)
    collectives.all_gather(buffer, layout).wait()
    with_it = len(threads())
    del collectives
    gc.collect()
    return with_it - len(threads())


def test_the_thread_ends_with_its_collectives(ranks2):
    assert ranks2.run(used_and_dropped) == [1, 1]


def test_a_worker_ends_after_what_it_has_to_do():
    worker, done = Worker(), []
    for number in range(100):
        worker.start(lambda number=number: done.append(number))
    worker.end()
    assert done == list(range(100))
    assert threads() == []


def test_what_a_job_raises_reaches_whoever_waits():
    worker, done = Worker(), []

    def fail():
        raise ValueError("no")

    failed, fine = worker.start(fail), worker.start(lambda: done.append(1))
    fine.wait()
    assert done == [1]
    with pytest.raises(ValueError, match="no"):
        failed.wait()
    worker.end()
