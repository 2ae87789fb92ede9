"""Collectives of CPU ranks on one machine, which read each other's memory directly.

[Note: direct reads]
Linux lets a process copy from another's memory in one system call (``process_vm_readv``, "cross memory attach"; MPI
libraries use it in the same way). An all-gather then is one copy of the others' parts, a reduce-scatter a copy and an
addition, and nothing goes through a socket but numbers of eight bytes: "my buffer is ready, at this address" and "I
have read yours". So does what little the ranks tell each other in every step: gloo's threads would compete for the
cores with these (docs/decisions.md). An operation is complete on a rank when all others have read what it offered: its
memory may change then. So that this does not depend on what the others' Python code is doing, a thread on each rank
carries operations out, in the order in which they were started, which is the same on all ranks.

[Note: one-sided]
Parameters that rest sharded do not move and change only while optimizers step. Any rank may read the others' parts at
any other time, in any order, as often as it likes, without their help: ranks that run different parts of the model, or
run them a different number of times, cannot come out of step. Before and after the update all ranks meet.

Whether it is allowed (one machine, one user, no security module against it) is tried out once when the ranks connect;
where any of them may not, all use gloo's messages.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_accel.core.collectives import (
    Agreement,
    Pending,
    Published,
    add_first,
    nbytes,
    sent_gathering,
    sent_reducing,
    sent_scattering,
)
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.layout import Layout
from lightning_accel.core.neighbours import LONGEST, Neighbours

_PR_SET_PTRACER = 0x59616D61
_ANY_PROCESS = ctypes.c_ulong(-1)
_PROBE = 0x6C6967687461636C
_CHUNK_BYTES = 2**21
"""What is read from another rank at once to be added. As quick as all of it (of 23 MiB: 15.7 ms, all at once 17.8 ms;
medians of 22, interleaved), in less memory."""
_DONE = 0
_READ = "the end of reading"


class DirectCollectives(GlooCollectives):
    """By reading each other's memory. See [Note: direct reads].

    Args:
        device: The CPU.
        group: The process group, of gloo.
        control: The same.
        neighbours: Connections to the other ranks; closed with this object, or when the process exits.

    """

    is_one_sided = True

    def __init__(
        self,
        device: torch.device,
        group: dist.ProcessGroup | None,
        control: dist.ProcessGroup | None,
        neighbours: Neighbours,
    ) -> None:
        super().__init__(device, group, control)
        self._neighbours = neighbours
        self._worker = Worker()
        self._reader = Worker()  # of its own: what one rank reads must not wait for what another has yet to start
        self._settled: _Wait | None = None  # when all ranks' parts have their new values
        # At exit as well: whoever waits for this process must be told, and no thread may outlive the interpreter.
        self._finalizer = weakref.finalize(self, _hang_up, neighbours, self._worker, self._reader)

    @staticmethod
    def connect(messages: GlooCollectives) -> DirectCollectives | None:
        """The same ranks, connected to read each other's memory; None if any may not. All of them must ask together."""
        _allow_reads()
        neighbours = Neighbours.connect(messages)
        if neighbours is None:
            return None
        offered = torch.tensor([_PROBE])
        addresses = neighbours.meet(offered.data_ptr(), "set-up")
        works = all(_can_read(neighbours.pids[rank], address) for rank, address in addresses.items())
        # This answer also keeps ``offered`` where it is until all have looked at it.
        if not all(messages.gather_objects(works)):
            neighbours.close()
            return None
        return DirectCollectives(messages.device, messages.group, messages.group, neighbours)

    @override
    def reduce_scatter(self, buffer: Tensor, layout: Layout, out: Tensor) -> Pending:
        self.traffic.add("reduce_scatter", sent_scattering(buffer, layout, self.rank))

        def carry_out() -> None:
            self._add_up(buffer, layout, out, self._neighbours.meet(buffer.data_ptr(), "reduce_scatter"))
            self._neighbours.meet(_DONE, _READ)

        return self._start("reduce_scatter", carry_out)

    @override
    def all_gather(self, buffer: Tensor, layout: Layout) -> Pending:
        self.traffic.add("all_gather", sent_gathering(buffer, layout, self.rank))

        def carry_out() -> None:
            self._copy(buffer, layout, self._neighbours.meet(buffer.data_ptr(), "all_gather"))
            self._neighbours.meet(_DONE, _READ)

        return self._start("all_gather", carry_out)

    @override
    def gather(self, part: Tensor, layout: Layout, whole: Tensor | None) -> None:
        if not self._finalizer.alive:  # the state of optimizers is saved after the end, too
            super().gather(part, layout, whole)
            return
        self._count_gather(part)

        def carry_out() -> None:
            addresses = self._neighbours.meet(part.data_ptr(), "gather")
            if whole is not None:
                for peer, address in addresses.items():
                    read_memory(self._neighbours.pids[peer], address, whole[slice(*layout.part(peer))])
            self._neighbours.meet(_DONE, _READ)

        pending = self._start("gather", carry_out)
        if whole is not None:
            whole[slice(*layout.part(0))].copy_(part)
        pending.wait()

    @override
    def all_reduce(self, buffer: Tensor, layout: Layout) -> Pending:
        self.traffic.add("all_reduce", sent_reducing(buffer, layout, self.rank))

        return self._start("all_reduce", lambda: self._reduce(buffer, layout, buffer))

    @override
    def all_reduce_as(self, buffer: Tensor, wire: Tensor, layout: Layout) -> Pending:
        if wire.dtype.itemsize >= buffer.dtype.itemsize:
            return super().all_reduce_as(buffer, wire, layout)
        self.traffic.add("all_reduce", sent_reducing(wire, layout, self.rank))

        def carry_out() -> None:
            self._reduce(wire, layout, buffer)
            buffer.copy_(wire)

        return self._start("all_reduce", carry_out)

    @override
    def all_reduce_after(self, first: Pending, buffer: Tensor, layout: Layout) -> Pending:
        self.traffic.add("all_reduce", sent_reducing(buffer, layout, self.rank))

        def carry_out() -> None:
            first.wait()
            self._reduce(buffer, layout, buffer)

        return self._start("all_reduce", carry_out)

    @override
    def agree(self, flags: Sequence[bool]) -> list[bool]:
        if not self._can_tell(len(flags)):
            return super().agree(flags)
        return [any(told) for told in zip(*self._tell(bytes(flags), "the end of backward")(), strict=True)]

    @override
    def start_agreement(self, flags: Sequence[bool]) -> Agreement:
        if not self._can_tell(len(flags)):
            return super().start_agreement(flags)
        wait = self._tell(bytes(flags), "backward")
        return Agreement(self.ranks, lambda: [sum(told) for told in zip(*wait(), strict=True)])

    @override
    def sum_scalar(self, value: Tensor, *, maximum: bool = False) -> Tensor:
        numbers = struct.Struct(f"={value.numel()}d")
        if not (self._can_tell(numbers.size) and value.is_floating_point()):
            return super().sum_scalar(value, maximum=maximum)
        everyone = self._tell(numbers.pack(*value.double().view(-1).tolist()), "a sum of numbers", "scalar")()
        told = torch.tensor([numbers.unpack(content) for content in everyone], dtype=torch.double)
        total = told.amax(0) if maximum else told.sum(0)  # by rank on all of them, so bit for bit the same
        return value.copy_(total.view_as(value))

    def _can_tell(self, size: int) -> bool:
        return self.ranks > 1 and size <= LONGEST and self._finalizer.alive

    def _tell(self, content: bytes, doing: str, kind: str = "agree") -> Callable[[], list[bytes]]:
        """Start to tell all others something of one size. What is returned waits, and gives what all told, by rank."""
        self.traffic.add(kind, len(content) * (self.ranks - 1))
        told = {self.rank: content}

        def carry_out() -> None:
            told.update(self._neighbours.exchange(content, doing))

        with torch.profiler.record_function(f"accel::{kind}"):
            pending = self._worker.submit(partial(self._or_hang_up, carry_out))

        def wait() -> list[bytes]:
            pending.wait()
            return [told[rank] for rank in range(self.ranks)]

        return wait

    @override
    def publish(self, parts: Sequence[Tensor]) -> list[Published]:
        everyone = self.gather_objects([part.data_ptr() for part in parts])
        return [
            Published(part, {peer: everyone[peer][position] for peer in self._peers()})
            for position, part in enumerate(parts)
        ]

    @override
    def fetch(self, source: Published, layout: Layout, buffer: Tensor) -> Pending:
        """Nobody else has to do anything for it: see [Note: one-sided]."""
        self.traffic.add("all_gather", sent_gathering(buffer, layout, self.rank))
        settled = self._settled

        def carry_out() -> None:
            if settled is not None:
                settled.wait()
            for peer, address in source.addresses.items():
                read_memory(self._neighbours.pids[peer], address, buffer[slice(*layout.part(peer))])

        with torch.profiler.record_function("accel::all_gather"):
            pending = self._reader.start(partial(self._or_hang_up, carry_out))
            buffer[slice(*layout.part(self.rank))].copy_(source.part)
        return pending

    @override
    def fence(self, doing: str) -> Pending:
        def meet() -> None:
            self._neighbours.meet(_DONE, doing)

        self._settled = self._worker.submit(partial(self._or_hang_up, meet))
        return Pending([self._settled])

    @override
    def linger(self, seconds: float) -> None:
        def meet() -> None:
            self._neighbours.meet(_DONE, "the end of the process")

        with contextlib.suppress(RuntimeError, futures.TimeoutError):  # a rank that is gone fetches nothing
            self._worker.submit(meet).wait(seconds)

    def _start(self, kind: str, job: Callable[[], None]) -> Pending:
        with torch.profiler.record_function(f"accel::{kind}"):  # shows in traces where a rank starts it
            return self._worker.start(partial(self._or_hang_up, job))

    def _or_hang_up(self, job: Callable[[], None]) -> None:
        """Carry out a job. After an error the ranks are out of step: none of the later ones may seem to succeed."""
        try:
            job()
        except BaseException:
            self._neighbours.close()
            raise

    @override
    def close(self) -> None:
        self._finalizer()

    def _reduce(self, buffer: Tensor, layout: Layout, total: Tensor) -> None:
        """Have the sum in ``buffer``; it is added up in this rank's part of ``total``, which may be wider."""
        own = slice(*layout.part(self.rank))
        addresses = self._neighbours.meet(buffer.data_ptr(), "all_reduce")
        self._add_up(buffer, layout, total[own], addresses)
        if total is not buffer:
            buffer[own].copy_(total[own])
        # When a rank has added up its part it has read that part of all buffers: it may be overwritten.
        self._neighbours.meet(_DONE, _READ)
        self._copy(buffer, layout, addresses)
        self._neighbours.meet(_DONE, _READ)

    def _add_up(self, buffer: Tensor, layout: Layout, out: Tensor, addresses: dict[int, int]) -> None:
        start, stop = layout.part(self.rank)
        own = buffer[start:stop]
        if not addresses:
            if out.data_ptr() != own.data_ptr():
                out.copy_(own)
            return
        size = buffer.element_size()
        length = min(stop - start, _CHUNK_BYTES // size)
        scratch = self._borrow(length, buffer)
        for begin in range(0, stop - start, max(length, 1)):
            end = min(begin + length, stop - start)
            other, first = scratch[: end - begin], True
            for peer, address in addresses.items():
                read_memory(self._neighbours.pids[peer], address + (start + begin) * size, other)
                if first:
                    add_first(own[begin:end], other, out[begin:end])
                else:
                    out[begin:end].add_(other)
                first = False
        self._scratch.append(scratch)

    def _copy(self, buffer: Tensor, layout: Layout, addresses: dict[int, int]) -> None:
        for peer, address in addresses.items():
            start, stop = layout.part(peer)
            read_memory(self._neighbours.pids[peer], address + start * buffer.element_size(), buffer[start:stop])


_Job: TypeAlias = "tuple[Callable[[], None], Future[None]]"


class Worker:
    """A thread that carries jobs out one after another. It starts with the first job."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], None]) -> Pending:
        """Have a job done; waiting for it raises what it raises."""
        return Pending([self.submit(job)])

    def submit(self, job: Callable[[], None]) -> _Wait:
        """The same, to be waited for any number of times."""
        if self._thread is None:
            # A daemon, or Python would wait for it at exit before anything could tell it to end.
            arguments = (self._jobs, torch.get_num_threads())
            self._thread = threading.Thread(target=_serve, args=arguments, name="lightning-accel", daemon=True)
            self._thread.start()
        future: Future[None] = Future()
        self._jobs.put((job, future))
        return _Wait(future)

    def end(self) -> None:
        """Carry out what was started, then end the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join()


def _hang_up(neighbours: Neighbours, *workers: Worker) -> None:
    neighbours.close()  # jobs that would wait for another rank fail now
    for worker in workers:
        worker.end()


class _Wait:
    """A future that is waited for as torch's works are."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self, timeout: float | None = None) -> None:
        self._future.result(timeout)

    def is_completed(self) -> bool:
        return self._future.done()


@torch.no_grad()
def _serve(jobs: queue.SimpleQueue[_Job | None], threads: int) -> None:
    torch.set_num_threads(threads)  # per thread: the default is all cores
    while (taken := jobs.get()) is not None:
        job, future = taken
        failure: BaseException | None = None
        try:
            job()
        except BaseException as error:  # handed to whoever waits
            failure = error
        del job, taken  # before its end is known: then nothing that it needed is held here any more
        if failure is None:
            future.set_result(None)
        else:
            future.set_exception(failure)
        del future, failure


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _allow_reads() -> None:
    """Let processes of the same user read this one's memory where the Yama security module restricts it."""
    prctl = getattr(_libc(), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PTRACER, _ANY_PROCESS, 0, 0, 0)


def _can_read(pid: int, address: int) -> bool:
    found = torch.zeros(1, dtype=torch.int64)
    try:
        read_memory(pid, address, found)
    except (OSError, AttributeError):  # forbidden, or unknown to this C library
        return False
    return int(found) == _PROBE


def read_memory(pid: int, address: int, into: Tensor) -> None:
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
