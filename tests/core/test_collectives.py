"""Each implementation of the collectives does the same, on even and uneven parts."""

import time

import pytest
import torch
import torch.distributed as dist

from lightning_accel.core.collectives import Pending
from lightning_accel.core.connecting import connect
from lightning_accel.core.direct import DirectCollectives
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.groups import absent_within
from lightning_accel.core.layout import even_layout, owned_layout
from lightning_accel.core.torch_collectives import TorchCollectives

LAYOUTS = {
    "even": lambda ranks: even_layout([(5, 5), (7,)], ranks),
    "uneven": lambda ranks: owned_layout([5, 9, 2], [0, 0, ranks - 1], ranks),  # of three ranks, one has nothing
}
KINDS = {
    "direct": lambda *given: DirectCollectives.connect(GlooCollectives(*given)),
    "gloo": GlooCollectives,
    "generic": TorchCollectives,
}


def contribution(rank, total, dtype):
    return (torch.arange(total) * 3 + 100 * rank).to(dtype)


def expected_sum(ranks, total, dtype):
    return sum(contribution(rank, total, dtype) for rank in range(ranks))


def exchange(kind, layout_name, dtype, in_place):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    collectives = KINDS[kind](torch.device("cpu"), None, None)
    layout = LAYOUTS[layout_name](ranks)
    start, stop = layout.part(rank)
    whole = expected_sum(ranks, layout.total, dtype)

    buffer = contribution(rank, layout.total, dtype)
    out = buffer[start:stop] if in_place else torch.empty(stop - start, dtype=dtype)
    collectives.reduce_scatter(buffer, layout, out).wait()
    assert torch.equal(out, whole[start:stop])

    gathered = torch.full((layout.total,), -1, dtype=dtype)
    gathered[start:stop] = whole[start:stop]
    collectives.all_gather(gathered, layout).wait()
    assert torch.equal(gathered, whole)

    collected = torch.full((layout.total,), -1, dtype=dtype) if rank == 0 else None
    collectives.gather(whole[start:stop], layout, collected)
    assert rank or torch.equal(collected, whole)

    reduced = contribution(rank, layout.total, dtype)
    collectives.all_reduce(reduced, layout).wait()
    assert torch.equal(reduced, whole)
    return collectives.traffic.take()


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_sums_and_gathers(world, kind, layout, dtype):
    in_places = [True, False] if kind != "generic" else [False]
    for in_place in in_places:
        ranks = world.run(exchange, kind, layout, dtype, in_place)
        size = LAYOUTS[layout](len(ranks)).total * dtype.itemsize
        for kind_of_operation in ("reduce_scatter", "all_gather"):
            # Whatever the cut, all ranks together send (N - 1) times the buffer.
            assert sum(sent[kind_of_operation] for _, sent in ranks) == (len(ranks) - 1) * size
        assert sum(sent["all_reduce"] for _, sent in ranks) == 2 * (len(ranks) - 1) * size
        # To one rank only: all parts but its own, once.
        parts = LAYOUTS[layout](len(ranks)).part
        expected = [0, *((stop - start) * dtype.itemsize for start, stop in map(parts, range(1, len(ranks))))]
        assert [sent["gather"] for _, sent in ranks] == expected
        once = {"reduce_scatter": 1, "all_gather": 1, "gather": 1, "all_reduce": 1}
        assert all(counts == once for counts, _ in ranks)


def several_under_way():
    """Many operations started before any is waited for, some waited for out of order."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    collectives = connect(torch.device("cpu"))
    layout = even_layout([(50,)], ranks)
    buffers = [contribution(rank, layout.total, torch.float64) + i for i in range(6)]
    operations = [collectives.all_reduce(buffer, layout) for buffer in buffers]
    for operation in operations:
        operation.advance()
    for operation in reversed(operations):
        operation.wait()
    whole = expected_sum(ranks, layout.total, torch.float64)
    return all(torch.equal(buffer, whole + ranks * i) for i, buffer in enumerate(buffers))


def test_operations_under_way_do_not_mix(ranks3):
    assert all(ranks3.run(several_under_way))


def made_of_others():
    collectives = GlooCollectives(torch.device("cpu"), None, None)
    layout = even_layout([(50,)], collectives.ranks)
    buffer = contribution(collectives.rank, layout.total, torch.float64)
    ready = []
    for start in (collectives.all_gather, collectives.all_reduce):
        pending = Pending([start(buffer, layout)])
        ready.append(pending.is_ready())
        pending.wait()
    return ready


def test_an_operation_made_of_messages_does_not_wait_to_be_told_of_them(ranks2):
    """gloo never tells: whoever asked before waiting would ask for as long as it has patience."""
    assert ranks2.run(made_of_others) == [[True, True]] * 2


def bits_of_all_reduce():
    collectives = connect(torch.device("cpu"))
    layout = even_layout([(1000,)], dist.get_world_size())
    torch.manual_seed(dist.get_rank())
    buffer = torch.randn(layout.total)
    collectives.all_reduce(buffer, layout).wait()
    return buffer


def test_all_reduce_gives_every_rank_the_same_bits(ranks3):
    first, *others = ranks3.run(bits_of_all_reduce)
    assert all(torch.equal(first, other) for other in others)


def small_ones():
    collectives = connect(torch.device("cpu"))
    rank, ranks = collectives.rank, collectives.ranks
    flags = collectives.agree([rank == 0, rank == 1, False])
    total = collectives.sum_scalar(torch.tensor(float(rank + 1))).item()
    largest = collectives.sum_scalar(torch.tensor(float(rank + 1)), maximum=True).item()
    tensor = torch.full((3,), float(rank))
    collectives.broadcast(tensor, source=ranks - 1)
    differing = collectives.start_agreement([True, rank == 0, False]).differing()
    return flags, total, largest, tensor.tolist(), collectives.gather_objects(rank), differing


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
def test_small_messages(world):
    found = world.run(small_ones)
    n = len(found)
    for flags, total, largest, tensor, objects, differing in found:
        assert flags == [1, int(n > 1), 0]
        assert total == n * (n + 1) / 2
        assert largest == n
        assert tensor == [n - 1.0] * 3
        assert objects == list(range(n))
        assert differing == ([1] if n > 1 else [])


def test_without_a_process_group_the_error_says_how_to_get_one():
    with pytest.raises(RuntimeError, match="torchrun"):
        connect(torch.device("cpu"))


def meet(late: list[float], patience: float) -> list[tuple[list[int] | None, float]]:
    """Whom this rank missed, time and again, and how long it took; it comes late, or never if negative."""
    found = []
    for turn in range(3):
        delay = late[dist.get_rank()] if turn == 1 else 0.0
        if delay < 0:
            time.sleep(4 * patience)
            return found
        time.sleep(delay)
        begin = time.monotonic()
        found.append((absent_within(patience), time.monotonic() - begin))
    return found


def test_ranks_meet_again_and_again(ranks3):
    for found in ranks3.run(meet, [0.0, 0.3, 0.0], 20.0):
        assert [absent for absent, _ in found] == [None, None, None]


@pytest.mark.parametrize("absent", [pytest.param(0, marks=pytest.mark.matrix), 2])
def test_nobody_waits_longer_for_a_rank_that_does_not_come(ranks3, absent):
    patience = 1.0
    results = ranks3.run(meet, [-1.0 if rank == absent else 0.0 for rank in range(3)], patience)
    for rank, found in enumerate(results):
        if rank != absent:
            assert [missing for missing, _ in found] == [None, [absent], [absent]]
            assert found[1][1] < 3 * patience
            assert found[2][1] < patience, "it is known by now"
