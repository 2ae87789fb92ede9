"""The largest batch size that fits, alone and on ranks of which only one runs out of memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from core.toys import Net, adamw, build, data, mse, my_share
from harness import Ranks
from lightning_accel.core import Engine
from lightning_accel.core.registry import open_engines
from lightning_accel.manual.batch_size import find_executable_batch_size, is_out_of_memory

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
def test_smaller_until_it_fits(error: Exception) -> None:
    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size: int, epochs: int, rate: float = 0.1) -> tuple[int, int, float]:
        """Train."""
        tried.append(batch_size)
        if batch_size > 3:
            raise error
        return batch_size, epochs, rate

    assert train(3, rate=0.5) == (3, 3, 0.5)
    assert tried == [4, 3]
    assert train(2) == (3, 2, 0.1)  # what has worked is tried first
    assert tried[2:] == [3]
    assert train.__doc__ == "Train."


def test_torchs_own_error_for_the_hosts_memory() -> None:
    def train(batch_size: int) -> int:
        torch.empty(batch_size, dtype=torch.uint8)
        return batch_size

    found = find_executable_batch_size(train, 2**60, reduce_batch_size_fn=iter([2**59, 2**10]).__next__)()
    assert found == 2**10


def test_nothing_fits() -> None:
    def train(batch_size: int) -> None:
        raise MemoryError

    with pytest.raises(
        RuntimeError, match="Expected some batch size from 2 down to 1 to fit into memory, but none did"
    ):
        find_executable_batch_size(train, 2)()


def test_what_is_another_error_is_raised() -> None:
    tried = []

    def train(batch_size: int) -> None:
        tried.append(batch_size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        find_executable_batch_size(train, 4)()
    assert tried == [4]
    assert not is_out_of_memory(ValueError("out of memory"))


def test_calls_that_cannot_be_meant() -> None:
    def train(batch_size: int, epochs: int) -> None: ...

    with pytest.raises(TypeError, match="Expected train to be called without its first argument, the batch size"):
        find_executable_batch_size(train)(128, 3)
    with pytest.raises(ValueError, match="positive starting_batch_size, got 0"):
        find_executable_batch_size(train, 0)


def test_memory_of_a_try_is_free_for_the_next() -> None:
    kept: list[Any] = []

    class Large: ...

    def train(batch_size: int) -> int:
        assert not [reference for reference in kept if reference() is not None]
        large = Large()
        kept.append(weakref.ref(large))
        if batch_size > 2:
            raise MemoryError
        return batch_size

    assert find_executable_batch_size(train, 3)() == 2


def on_ranks(row: str) -> tuple[list[int], int, int]:
    """Rank 1 runs out of memory where rank 0 does not."""
    tried = []

    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size: int) -> int:
        tried.append(batch_size)
        engine = Engine(build(Net), row)
        engine.add_optimizer(adamw(engine.module.parameters()))
        xs, ys = data(1, 2)
        engine.backward(mse(engine.module, my_share(xs[0]), my_share(ys[0])))
        if batch_size > 6 and dist.get_rank() == 1:
            raise MemoryError
        return batch_size

    found = train()
    gc.collect()
    return tried, found, len(open_engines())


@pytest.mark.parametrize("row", ["zero2", pytest.param("fsdp", marks=pytest.mark.matrix)])
def test_all_ranks_agree_on_the_size(ranks2: Ranks, row: str) -> None:
    assert ranks2.run(on_ranks, row) == [([8, 7, 6], 6, 0)] * 2


def breaks_what_connects_them() -> None:
    def train(batch_size: int) -> None:
        if dist.get_rank() == 1:
            raise MemoryError
        raise RuntimeError("Connection closed by peer")  # as a collective does that waits for the other

    find_executable_batch_size(train, 4)()


def test_a_rank_that_runs_out_while_another_waits(ranks2: Ranks) -> None:
    for error in ranks2.run_expecting_error(breaks_what_connects_them):
        assert error is not None
        assert "With a batch size of 4 rank 1 did while rank 0 was in a collective" in error[1]
        assert "start again with a smaller starting_batch_size" in error[1]


def one_fails() -> None:
    def train(batch_size: int) -> None:
        if dist.get_rank() == 1:
            raise KeyError("label")

    find_executable_batch_size(train, 4)()


def test_another_error_on_one_rank_is_one_on_all(ranks2: Ranks) -> None:
    first, second = ranks2.run_expecting_error(one_fails)
    assert first == ("RuntimeError", "rank 1 has failed: KeyError: 'label'")
    assert second is not None
    assert second[0] == "KeyError"
