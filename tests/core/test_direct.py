import ctypes
import gc
import os
import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from core.toys import ROW_NAMES, prepared, train
from lightning_accel.core import direct
from lightning_accel.core.connecting import connect
from lightning_accel.core.direct import Worker
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.layout import even_layout
from lightning_accel.core.neighbours import LONGEST
from rows import everyday


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


def told_apart(seed):
    """What the ranks tell each other by their own sockets, and by gloo's messages."""
    own = connect(torch.device("cpu"))
    messages = GlooCollectives(torch.device("cpu"), None, None)
    generator = torch.Generator().manual_seed(100 * seed + own.rank)
    flags = (torch.rand(50, generator=generator) < 0.3).tolist()
    numbers = torch.randn(5, generator=generator, dtype=torch.double)
    return [
        (
            some.agree(flags),
            some.start_agreement(flags).differing(),
            some.sum_scalar(numbers.clone()),
            some.sum_scalar(numbers.float(), maximum=True),
            some.sum_scalar(torch.tensor(own.rank + 2**60)),
        )
        for some in (own, messages)
    ]


def test_what_ranks_tell_each_other_is_what_gloo_would_tell(ranks3):
    for seed in range(5):
        found = ranks3.run(told_apart, seed)
        (first, _), *_ = found
        for own, messages in found:
            assert own[:2] == messages[:2]
            assert own[1]
            assert torch.equal(own[2], first[2]), "the same bits on every rank"
            # Three numbers of about 1, added up in another order: two roundings of 1e-16 each.
            torch.testing.assert_close(own[2], messages[2], rtol=0, atol=1e-15)
            assert torch.equal(own[3], messages[3])
            assert own[3].dtype == torch.float
            assert own[4] == messages[4]


def without_gloo(row):
    """Steps while gloo's collectives are an error, and how many numbers each told."""
    engine, optimizer = prepared(row)
    train(engine, optimizer, 2)  # what is learned once is told by gloo
    with mock.patch.multiple(dist, all_reduce=None, all_gather=None, isend=None, irecv=None):
        train(engine, optimizer, 3)
        norm = engine.clip_grad_norm_(optimizer, 1.0)
    engine.wait()
    engine.close()
    return norm.item()


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_a_step_needs_none_of_gloos_messages(ranks2, row):
    first, second = ranks2.run(without_gloo, row)
    assert first == second > 0


def many_flags():
    collectives = connect(torch.device("cpu"))
    flags = [index % (2 + collectives.rank) == 0 for index in range(LONGEST + 1)]
    agreed = collectives.agree(flags)
    differing = collectives.start_agreement(flags).differing()
    return agreed, differing


def test_more_flags_than_a_message_takes(ranks2):
    numbers = range(LONGEST + 1)
    for agreed, differing in ranks2.run(many_flags):
        assert agreed == [number % 2 == 0 or number % 3 == 0 for number in numbers]
        assert differing == [number for number in numbers if (number % 2 == 0) != (number % 3 == 0)]


def different_numbers_of_flags():
    collectives = connect(torch.device("cpu"))
    with pytest.raises(RuntimeError) as caught:
        collectives.agree([True] * (3 + collectives.rank))
    return str(caught.value)


def test_ranks_whose_models_have_different_numbers_of_parameters(ranks2):
    first, second = ranks2.run(different_numbers_of_flags)
    assert "for the end of backward rank 1 tells of 4 and this one of 3" in first
    assert "rank 0 tells of 3 and this one of 4" in second
