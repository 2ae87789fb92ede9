"""Collectives of CPU ranks on one machine, which read each other's memory directly.

[Note: direct reads]
Linux lets a process copy from another's memory in one system call (``process_vm_readv``, "cross memory attach"; MPI
libraries use it in the same way). An all-gather then is one copy of the others' parts, a reduce-scatter a copy and an
addition, and nothing goes through a socket but tokens of eight bytes: "my buffer is ready, at this address" and "I have
read yours". An operation is complete on a rank when all others have read what it offered: its memory may change then.
So that this does not depend on what the others' Python code is doing, a thread on each rank carries operations out, in
the order in which they were started, which is the same on all ranks.

Whether it is allowed (one machine, one user, no security module against it) is tried out once when the ranks connect;
where any of them may not, all use gloo's messages.
"""

from __future__ import annotations

import ctypes
import os
import queue
import socket
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_accel.core.collectives import (
    GlooCollectives,
    Pending,
    nbytes,
    sent_gathering,
    sent_reducing,
    sent_scattering,
)
from lightning_accel.core.layout import Layout

_PR_SET_PTRACER = 0x59616D61
_ANY_PROCESS = ctypes.c_ulong(-1)
_PROBE = 0x6C6967687461636C


class DirectCollectives(GlooCollectives):
    """By reading each other's memory. See [Note: direct reads]."""

    def __init__(
        self, device: torch.device, group: dist.ProcessGroup | None, control: dist.ProcessGroup | None
    ) -> None:
        super().__init__(device, group, control)
        self._pids: list[int] = self.gather_objects(os.getpid())
        self._worker = Worker()

    @staticmethod
    def probe(base: GlooCollectives) -> bool:
        """Whether all ranks can read each other's memory. All of them must ask together."""
        offered = torch.tensor([_PROBE])
        _allow_reads()
        everyone = base.gather_objects((socket.gethostname(), os.getpid(), offered.data_ptr()))
        works = all(_can_read(*other) for other in everyone)
        return all(base.gather_objects(works))

    @override
    def reduce_scatter(self, buffer: Tensor, layout: Layout, out: Tensor) -> Pending:
        self.traffic.add("reduce_scatter", sent_scattering(buffer, layout, self.rank))
        ready, read = self._meet(buffer.data_ptr()), self._meet(0)

        def carry_out() -> None:
            self._add_up(buffer, layout, out, ready())
            read()

        return self._worker.start(carry_out)

    @override
    def all_gather(self, buffer: Tensor, layout: Layout) -> Pending:
        self.traffic.add("all_gather", sent_gathering(buffer, layout, self.rank))
        ready, read = self._meet(buffer.data_ptr()), self._meet(0)

        def carry_out() -> None:
            self._copy(buffer, layout, ready())
            read()

        return self._worker.start(carry_out)

    @override
    def all_reduce(self, buffer: Tensor, layout: Layout) -> Pending:
        self.traffic.add("all_reduce", sent_reducing(buffer, layout, self.rank))
        ready, added, read = self._meet(buffer.data_ptr()), self._meet(0), self._meet(0)

        def carry_out() -> None:
            addresses = ready()
            self._add_up(buffer, layout, buffer[slice(*layout.part(self.rank))], addresses)
            # When a rank has added up its part it has read that part of all buffers: it may be overwritten.
            added()
            self._copy(buffer, layout, addresses)
            read()

        return self._worker.start(carry_out)

    def _add_up(self, buffer: Tensor, layout: Layout, out: Tensor, addresses: dict[int, int]) -> None:
        start, stop = layout.part(self.rank)
        own = buffer[start:stop]
        scratch = self._borrow(stop - start, buffer)
        other, first = scratch[: stop - start], True
        for peer, address in addresses.items():
            self._read(peer, address + start * buffer.element_size(), other)
            torch.add(own if first else out, other, out=out)
            first = False
        if first and out.data_ptr() != own.data_ptr():
            out.copy_(own)
        self._scratch.append(scratch)

    def _copy(self, buffer: Tensor, layout: Layout, addresses: dict[int, int]) -> None:
        for peer, address in addresses.items():
            start, stop = layout.part(peer)
            self._read(peer, address + start * buffer.element_size(), buffer[start:stop])

    def _read(self, peer: int, address: int, into: Tensor) -> None:
        _read_memory(self._pids[peer], address, into)

    def _meet(self, number: int) -> Callable[[], dict[int, int]]:
        """Prepare to tell the others a number and to be told theirs.

        Receiving is prepared now, so that a sender never waits for this rank to come to it. Sending and waiting are
        done by what is returned, which gives the others' numbers by rank.
        """
        tag = self._next_tag()
        inbox = {peer: torch.empty(1, dtype=torch.int64) for peer in self._peers()}
        received = [work for peer, box in inbox.items() for work in self._receive(box, peer, tag)]
        outgoing = torch.tensor([number])

        def meet() -> dict[int, int]:
            sent = [work for peer in inbox for work in self._send(outgoing, peer, tag)]
            for work in received + sent:
                work.wait()
            return {peer: int(box) for peer, box in inbox.items()}

        return meet


_Job: TypeAlias = "tuple[Callable[[], None], Future[None]]"


class Worker:
    """A thread that carries jobs out one after another. It starts with the first job and ends with this object."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._started = False
        weakref.finalize(self, self._jobs.put, None)

    def start(self, job: Callable[[], None]) -> Pending:
        """Have a job done; waiting for it raises what it raises."""
        if not self._started:
            self._started = True
            # A daemon: a process that fails must not wait at exit for peers that wait for it.
            arguments = (self._jobs, torch.get_num_threads())
            threading.Thread(target=_serve, args=arguments, name="lightning-accel", daemon=True).start()
        future: Future[None] = Future()
        self._jobs.put((job, future))
        return Pending([_Wait(future)])


class _Wait:
    """A future that is waited for as torch's works are."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


@torch.no_grad()
def _serve(jobs: queue.SimpleQueue[_Job | None], threads: int) -> None:
    torch.set_num_threads(threads)  # per thread: the default is all cores
    while (taken := jobs.get()) is not None:
        job, future = taken
        try:
            job()
        except BaseException as error:  # handed to whoever waits
            future.set_exception(error)
        else:
            future.set_result(None)
        del job, future, taken


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _allow_reads() -> None:
    """Let processes of the same user read this one's memory where the Yama security module restricts it."""
    prctl = getattr(_libc(), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PTRACER, _ANY_PROCESS, 0, 0, 0)


def _can_read(host: str, pid: int, address: int) -> bool:
    found = torch.zeros(1, dtype=torch.int64)
    try:
        _read_memory(pid, address, found)
    except (OSError, AttributeError):
        return False
    return host == socket.gethostname() and int(found) == _PROBE


def _read_memory(pid: int, address: int, into: Tensor) -> None:
    """Fill a contiguous tensor from another process's memory.

    Raises:
        OSError: If that is not allowed, or the process is gone.

    """
    size, done = nbytes(into), 0
    call = _libc().process_vm_readv
    call.restype = ctypes.c_ssize_t
    while done < size:
        local = _Range(into.data_ptr() + done, size - done)
        remote = _Range(address + done, size - done)
        count = call(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if count <= 0:
            error = ctypes.get_errno()
            raise OSError(error, f"reading the memory of process {pid}: {os.strerror(error)}")
        done += count
