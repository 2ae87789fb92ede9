"""One rank of one peer: a process that waits on a pipe, does what it is told and answers.

This module imports nothing heavy at its top, and neither do those that it is sent objects of, so that the environment
is set before torch reads it.
"""

import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import hosts
from benchmarks.config import Config

if TYPE_CHECKING:
    from benchmarks.peers import Spec

# A rank that waits this long in one collective has lost its peers.
_COLLECTIVE_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class Post:
    """Where a worker stands."""

    config: Config
    rank: int
    world_size: int
    threads: int
    rendezvous: str
    """Path of the file that the ranks of one peer meet at."""
    checkpoints: str
    """Path of a folder to save in, on the disk of all ranks; it is not there yet."""
    born: float
    """`time.perf_counter()` when the process was started; all processes of a machine share that clock on Linux."""
    log: str
    """Path of the file that takes all that the process prints."""
    hosts: Sequence[str] = ()
    """The network namespaces that the ranks are on, in blocks of equal size; none for the machine's own."""

    @property
    def per_host(self) -> int:
        """How many ranks one host has."""
        return self.world_size // (len(self.hosts) or 1)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a worker says to a command; `error` is a traceback, and then the process has ended."""

    value: Any = None
    error: str | None = None


def work(spec: "Spec", post: Post, pipe: Connection) -> None:
    """Serve commands until the pipe closes or ``close`` comes."""
    _redirect_output(post.log)
    faulthandler.enable()
    try:
        if post.hosts:
            hosts.enter(post.hosts[post.rank // post.per_host])
        _set_environment(post)
        _serve(spec, post, pipe)
    except EOFError:  # the benchmark itself is gone
        sys.exit(1)
    except BaseException:
        pipe.send(Answer(error=traceback.format_exc()))
        sys.exit(1)


def _redirect_output(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _set_environment(post: Post) -> None:
    os.environ.update(
        OMP_NUM_THREADS=str(post.threads),
        MKL_NUM_THREADS=str(post.threads),
        GLOO_SOCKET_IFNAME=hosts.NIC if post.hosts else "lo",
        # With these Lightning takes the ranks for torchrun's: it launches none, and joins the process group it finds.
        RANK=str(post.rank),
        LOCAL_RANK=str(post.rank % post.per_host),
        WORLD_SIZE=str(post.world_size),
        LOCAL_WORLD_SIZE=str(post.per_host),
        GROUP_RANK=str(post.rank // post.per_host),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",  # read by Lightning, bound by nobody: the ranks have met at a file before it looks
        TORCHELASTIC_RUN_ID="benchmarks",
    )


def _serve(spec: "Spec", post: Post, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from benchmarks import measure
    from benchmarks.timeline import Recorder, allocator_peak

    torch.set_num_threads(post.threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{post.rendezvous}",
        rank=post.rank,
        world_size=post.world_size,
        timeout=_COLLECTIVE_TIMEOUT,
    )
    peer = spec.load()(**spec.arguments)
    _touch_torch()
    measure.reset_peak()
    before = measure.resident_bytes()
    peer.setup(replace(post.config, rank=post.rank))
    peer.first_step()
    pipe.send(Answer(value=time.perf_counter() - post.born))
    while True:
        command, steps = pipe.recv()
        answer: Any = None
        if command == "train":
            peer.run(steps)
        elif command == "time":
            clock, cpu = measure.Clock(), time.process_time()
            dist.barrier()
            peer.run(steps, clock)
            # All threads' time, lead-in included: what this process took of the machine while it was being timed.
            answer = {"wall": clock.wall, "cpu": time.process_time() - cpu}
        elif command == "wire":
            wire = measure.Wire()
            peer.run(steps, wire)
            answer = wire.sent
        elif command == "collectives":
            collectives = measure.Collectives()
            peer.run(steps, collectives)
            answer = collectives.counts
        elif command == "allocator":
            answer = allocator_peak(peer)
        elif command == "timeline":
            recorder = Recorder(peer)
            recorder.run()
            answer = recorder.timeline
        elif command == "saving":
            answer = peer.time_saving(Path(post.checkpoints), post.config.saves)
        elif command == "losses":
            answer = peer.history
        elif command == "peak":
            answer = measure.peak_resident_bytes() - before
        elif command == "report":
            answer = {"at_rest": peer.report(), "own": peer.own_report()}
        elif command == "close":
            peer.teardown()
            dist.barrier()
            dist.destroy_process_group()
            pipe.send(Answer())
            return
        else:
            raise ValueError(f"Expected a command, got {command!r}.")
        pipe.send(Answer(value=answer))


def _touch_torch() -> None:
    """Train one tiny step, so that the code torch loads on first use is not taken for a peer's memory."""
    import torch

    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(8, 8)).sum().backward()
    optimizer.step()
