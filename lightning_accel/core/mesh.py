"""The ranks in two dimensions: those that divide the model state, and those that hold the same part of it.

::

              shard 0   shard 1   shard 2                 ranks 0..5, shard_size 3
    copy 0       0         1         2        <- ``shard``: divide one copy of the state
    copy 1       3         4         5
                 ^ ``replicate``: hold the same part

Gradients are reduce-scattered along a row and all-reduced along a column; parameters are gathered along a row. With
a row for each machine, what travels between machines is 1/shard_size of the model. (Hybrid sharding: Zhao et al.,
"PyTorch FSDP", 2023; Zhang et al., "MiCS: Near-linear Scaling for Training Gigantic Model on Public Cloud", 2022.)
All other rows have one copy: ``shard`` is the world, and there is nobody to replicate.
"""

from __future__ import annotations

import os
import socket
import weakref

import torch.distributed as dist
from torch import Tensor

from lightning_accel.core.collectives import Collectives, Pending
from lightning_accel.core.connecting import connect
from lightning_accel.core.groups import timeout_of
from lightning_accel.core.layout import Layout, even_cuts


class Mesh:
    """The collectives of each dimension.

    Args:
        world: All ranks.
        shard: Those that divide a copy of the model state.
        replicate: Those that hold the same part, if more than this one.

    """

    def __init__(self, world: Collectives, shard: Collectives, replicate: Collectives | None = None) -> None:
        self.world = world
        self.shard = shard
        self.replicate = replicate
        for part in (shard, replicate):
            if part is not None:
                part.traffic = world.traffic
                part.phases = world.phases

    @staticmethod
    def connect(world: Collectives, shard_size: int) -> Mesh:
        """Divide the world. All ranks take part.

        Args:
            world: All ranks.
            shard_size: How many neighbouring ranks divide a copy.

        Raises:
            ValueError: If the number of ranks is no multiple of it.

        """
        if shard_size < 1 or world.ranks % shard_size:
            raise ValueError(
                f"Expected shard_size to divide the number of ranks, got {shard_size} for {world.ranks} ranks."
            )
        if shard_size == world.ranks:
            return Mesh(world, world)
        rows = [range(start, start + shard_size) for start in range(0, world.ranks, shard_size)]
        columns = [range(start, world.ranks, shard_size) for start in range(shard_size)]
        ours = [connect(world.device, _subgroup(world, lines)) for lines in (rows, columns)]
        return Mesh(world, *ours)

    @property
    def copies(self) -> int:
        """How often the whole state is there."""
        return 1 if self.replicate is None else self.replicate.ranks

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank has a part of the copy of which rank 0 of the world has the first part."""
        return self.world.rank < self.shard.ranks

    def reduce_across(self, first: Pending, part: Tensor) -> Pending:
        """Sum this rank's part over the copies, in place, once ``first`` has put the sum over a copy there."""
        if self.replicate is None:
            return first
        layout = Layout((), even_cuts(part.numel(), self.replicate.ranks))
        return self.replicate.all_reduce_after(first, part, layout)

    def trim(self) -> None:
        """Free memory that is kept for later operations. Nothing may be under way."""
        for part in (self.shard, self.replicate):
            if part is not None:
                part.trim()

    def close(self) -> None:
        """Free what belongs to the mesh only; the world's process group still works."""
        for part in (self.shard, self.replicate):
            if part is not None and part is not self.world:
                part.close()
        self.world.close()


def ranks_of_node(world: Collectives) -> int:
    """How many ranks there are on each machine. All ranks take part.

    Raises:
        ValueError: If it is not the same number on all machines.

    """
    # What torchrun says counts: it may have been started several times on one machine.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    told = world.gather_objects((socket.gethostname(), local))
    sizes: set[int] = {local or sum(host == name for name, _ in told) for host, local in told}
    if len(sizes) > 1:
        raise ValueError(
            f"Expected as many ranks on one machine as on another, got {', '.join(map(str, sorted(sizes)))}. Choose how"
            " many ranks divide the model by shard_size=..."
        )
    (size,) = sizes
    return size


_subgroups: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]]
_subgroups = weakref.WeakKeyDictionary()
"""Those made so far, by the group they divide: process groups cannot be ended safely, so they are used again."""


def _subgroup(world: Collectives, lines: list[range]) -> dist.ProcessGroup:
    whole = world.group or dist.group.WORLD
    assert whole is not None
    members = dist.get_process_group_ranks(whole)
    (line,) = (line for line in lines if world.rank in line)
    ranks = tuple(members[rank] for rank in line)
    known = _subgroups.setdefault(whole, {})
    if ranks not in known:
        # Only those that belong to it take part: the whole may be a part of all processes itself.
        known[ranks] = dist.new_group(
            list(ranks),
            timeout=timeout_of(whole, world.device),
            backend=dist.get_backend(whole),
            use_local_synchronization=True,
        )
    return known[ranks]
