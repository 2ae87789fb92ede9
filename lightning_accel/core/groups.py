"""Process groups: those made beside others, how long they wait, and whether all ranks come."""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta

import torch
import torch.distributed as dist

_PAUSE_S = 0.05
"""Between two looks at whether the other ranks have come."""


def group_beside(group: dist.ProcessGroup | None, device: torch.device) -> dist.ProcessGroup:
    """A group of the same ranks, for messages of the host. All of them make it together."""
    whole = group is None or group is dist.group.WORLD
    made: dist.ProcessGroup = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=timeout_of(group, device),
        backend=host_backend(),
        # Of a part of all processes only its own take part. Torch then makes the name from the number of groups that a
        # process is in, which may differ between ranks: where all take part it is not done so.
        use_local_synchronization=not whole,
    )
    return made


def backend_of(group: dist.ProcessGroup | None, device: torch.device) -> str:
    """The name of the back end that carries a group's messages of a device's tensors; empty if there is none.

    Not by ``dist.get_backend``, which does not know where torch has chosen.
    """
    config = dist.get_backend_config(group)  # as "cpu:gloo,cuda:nccl"
    return dict(entry.split(":") for entry in config.split(",")).get(device.type, "")


def host_backend() -> str:
    """The back end for messages of the host: torch's for the CPU, which is gloo unless another has taken its place."""
    name: str = dist.Backend.default_device_backend_map["cpu"]
    return name


def timeout_of(group: dist.ProcessGroup | None, device: torch.device) -> timedelta:
    """How long a process group waits for its ranks."""
    backend = (group or dist.group.WORLD)._get_backend(device)  # type: ignore[union-attr]
    options = getattr(backend, "options", None)
    timeout: timedelta = getattr(options, "_timeout", dist.default_pg_timeout)
    return timeout


def absent_within(seconds: float, group: dist.ProcessGroup | None = None) -> list[int] | None:
    """Wait until all ranks of a group have come here, at most so long.

    Nothing is left under way: a collective that somebody misses has gloo wait for the group's own, long time.
    (So does ``dist.monitored_barrier`` on all ranks but the first.)

    Args:
        seconds: How long to wait.
        group: The group; by default that of all ranks.

    Returns:
        None if all came. Otherwise those that had not when the first rank gave up; for ranks that come later, too, and
        for all meetings from then on. Empty if nobody can tell, as the rank that counts is gone.

    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if ranks == 1:
        return None
    store = dist.distributed_c10d._get_process_group_store(group or dist.group.WORLD)  # type: ignore[arg-type]
    deadline = time.monotonic() + seconds
    with contextlib.suppress(RuntimeError):  # the store is on a rank, which may be gone
        meeting = store.add(f"accel/arrived/{rank}", 1)
        store.add("accel/arrived", 1)
        while not store.add("accel/missed", 0):
            if store.add("accel/arrived", 0) >= meeting * ranks:  # all meetings before were full
                return None
            if time.monotonic() > deadline:
                absent = [other for other in range(ranks) if store.add(f"accel/arrived/{other}", 0) < meeting]
                store.set("accel/absent", ",".join(map(str, absent)))
                store.add("accel/missed", 1)
            time.sleep(_PAUSE_S)
        return [int(other) for other in store.get("accel/absent").decode().split(",") if other]
    return []
