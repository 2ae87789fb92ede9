import ctypes
import os
import threading

import pytest
import torch
import torch.distributed as dist

from lightning_accel.core import direct
from lightning_accel.core.collectives import GlooCollectives, connect
from lightning_accel.core.direct import DirectCollectives, Worker


def chosen(forbid):
    if forbid and dist.get_rank() == 1:  # one rank may not: then none does
        direct._can_read = lambda *_: False
    return type(connect(torch.device("cpu"))).__name__


def test_ranks_of_one_machine_read_each_others_memory(ranks2):
    assert ranks2.run(chosen, False) == ["DirectCollectives"] * 2


def test_if_one_rank_may_not_read_all_send_messages(ranks2):
    assert ranks2.run(chosen, True) == ["GlooCollectives"] * 2
    ranks2.close()  # it was told so by changing a module


def probed():
    return DirectCollectives.probe(GlooCollectives(torch.device("cpu"), None, None))


def test_the_probe_is_the_same_on_all_ranks(ranks3):
    assert len(set(ranks3.run(probed))) == 1


def test_reading_ones_own_memory():
    source, target = torch.arange(1000.0), torch.zeros(500)
    direct._read_memory(os.getpid(), source.data_ptr() + 400, target)
    assert torch.equal(target, source[100:600])


def test_reading_where_nothing_is_or_of_a_process_that_is_gone():
    target = torch.zeros(4)
    with pytest.raises(OSError, match="reading the memory of process"):
        direct._read_memory(os.getpid(), 8, target)
    with pytest.raises(OSError, match="No such process"):
        direct._read_memory(2**22 - 1, ctypes.addressof(ctypes.c_int()), target)


def test_the_thread_ends_with_its_worker():
    before = threading.active_count()
    worker = Worker()
    worker.start(lambda: None).wait()
    assert threading.active_count() == before + 1
    (thread,) = [t for t in threading.enumerate() if t.name == "lightning-accel"]
    del worker
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_what_a_job_raises_reaches_whoever_waits():
    worker, done = Worker(), []

    def fail():
        raise ValueError("no")

    failed, fine = worker.start(fail), worker.start(lambda: done.append(1))
    fine.wait()
    assert done == [1]
    with pytest.raises(ValueError, match="no"):
        failed.wait()
