"""Collectives of one rank among many that are not there: what would be allocated and sent, without any data.

[Note: a simulated rank]
Under torch's fake process group every collective returns at once and moves nothing. The engine runs on it as it is, as
one of any number of ranks, and with torch's fake tensors, which have shapes and no values, in no memory. Its
operations are those of :class:`TorchCollectives`: what NCCL would be asked for, with the temporary memory that this
takes, and counted by the same code. What the engine decides by values that other ranks tell is decided as if all others
were in the same place as this one.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from typing_extensions import override

from lightning_accel.core.collectives import Agreement, Collectives, Pending, ring
from lightning_accel.core.layout import Layout
from lightning_accel.core.torch_collectives import TorchCollectives

_names = itertools.count(1 << 20, 1 << 10)
"""Where the numbers begin that torch names process groups by: within one process no two may have the same."""


@contextmanager
def simulated(ranks: int, rank: int = 0) -> Iterator[None]:
    """Within it, this process is one of many ranks that are not there: torch's default group is a fake one.

    Process groups that there are already are out of sight meanwhile, and as before afterwards.

    Args:
        ranks: How many.
        rank: Which of them this is.

    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before, c10d._world = c10d._world, c10d._World()
    c10d._world.group_count = next(_names)
    try:
        with warnings.catch_warnings():
            # Of fake tensors: where each lies in its unit's memory is all that the engine asks for.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
            yield
    finally:
        for name in c10d._world.pg_names.values():
            c10d._unregister_process_group(name)
        c10d._world = before


class SimulatedCollectives(TorchCollectives):
    """Of torch's fake process group. See [Note: a simulated rank]."""

    _scatters_in_one = True

    @override
    def reduce_scatter(self, buffer: Tensor, layout: Layout, out: Tensor) -> Pending:
        return _Done(super().reduce_scatter(buffer, layout, out))

    @override
    def all_gather(self, buffer: Tensor, layout: Layout) -> Pending:
        return _Done(super().all_gather(buffer, layout))

    @override
    def all_reduce(self, buffer: Tensor, layout: Layout) -> Pending:
        return _Done(super().all_reduce(buffer, layout))

    @override
    def agree(self, flags: Sequence[bool]) -> list[bool]:
        self._count_flags(len(flags))
        return list(flags)

    @override
    def start_agreement(self, flags: Sequence[bool]) -> Agreement:
        self._count_flags(len(flags) * torch.int32.itemsize)
        return Agreement(self.ranks, lambda: [self.ranks * flag for flag in flags])

    def _count_flags(self, size: int) -> None:
        if self.ranks > 1:
            self.traffic.add("agree", ring(size, self.ranks, passes=2))

    @override
    def beside(self) -> dist.ProcessGroup:
        group = self.group or dist.group.WORLD
        assert group is not None
        return group

    @override
    def gather_numbers(self, number: int, group: dist.ProcessGroup) -> list[int]:
        self.traffic.add("agree", torch.int64.itemsize * (self.ranks - 1))
        return [number] * self.ranks

    @override
    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.ranks

    @override
    def all_reduce_after(self, first: Pending, buffer: Tensor, layout: Layout) -> Pending:
        # On any device: there is no stream to wait on.
        return Collectives.all_reduce_after(self, first, buffer, layout)


class _Done(Pending):
    """An operation that is ready as soon as it is asked for: torch's fake works never say so."""

    def __init__(self, operation: Pending) -> None:
        super().__init__([operation])

    @override
    def is_ready(self) -> bool:
        return True
