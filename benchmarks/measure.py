"""The figures and how each is taken. Linux only: memory and wire come out of the kernel, not out of the peers.

[Note: time] Wall clock around `steps` optimizer steps that follow a barrier and one lead-in step, divided by `steps`;
the slowest rank counts. Every peer lives in processes of its own which sleep while another peer is timed.

[Note: wire] The bytes the kernel has sent on this process's TCP connections (``TCP_INFO``'s ``tcpi_bytes_sent``, less
what it sent twice) before and after the steps. gloo on one machine moves all its data through such connections, so the
count needs no help from the peer, misses nothing that a peer does below torch's Python API, and sees no other process
(the counters of the loopback device add up everybody on the machine). It includes gloo's few bytes of header per
message. What our ranks on one machine read straight from each other's memory crosses no connection; it is added,
counted around the system call that reads it. Each rank reads as much as the others would have to send it. What they
tell each other over sockets that are not TCP's is added, too.

[Note: collectives] The ``c10d::`` operators that torch's profiler sees during one step; every collective, send and
receive passes that dispatcher exactly once, whether DDP's C++ reducer, a DTensor or our engine has issued it. Direct
reads, and what ranks tell each other beside them, do not pass there: our engine marks them as ``accel::`` operators,
once each.

[Note: peak memory] The kernel's high-water mark of the resident set (``VmHWM``, reset first) after the first steps,
less the resident set just before the model is built; in processes that never run another peer.

[Note: bytes at rest] A walk over the tensors that really are alive at the moment an update is due: gradients complete,
activations gone, optimizer state there. Each storage counts once, a view counts as its storage, a DTensor as its
local shard. Whatever is alive and neither parameter, gradient nor optimizer state is "other", so nothing is left out.
"""

import gc
import os
import re
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

KINDS = ("parameters", "gradients", "optimizer", "other")
"""The kinds of bytes at rest."""

# Where `struct tcp_info` of linux/tcp.h has tcpi_bytes_sent and tcpi_bytes_retrans, both u64 (Linux 4.19 and later).
_BYTES_SENT_OFFSET = 200
# All is taken to be quiet when nothing was sent or read for this long. Loopback delivers within microseconds, but a
# thread that reads may have to wait for a core.
QUIET_SECONDS = 0.2


class Probe(Protocol):
    """Something that is held around the steps it measures."""

    def __enter__(self) -> object: ...

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None: ...


class Clock:
    """See [Note: time]; `wall` is in seconds."""

    def __enter__(self) -> "Clock":
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._start


class Wire:
    """See [Note: wire]; `sent` is in bytes."""

    def __enter__(self) -> "Wire":
        self._read = 0
        self._watching = ExitStack()
        if direct := sys.modules.get("lightning_accel.core.direct"):
            self._watching.enter_context(mock.patch.object(direct, "read_memory", self._reading(direct.read_memory)))
            tell = direct.Neighbours.exchange
            self._watching.enter_context(mock.patch.object(direct.Neighbours, "exchange", self._telling(tell)))
        self._before = self._at_rest()
        # The barrier that ends the window is inside it: find out what one costs.
        self._barrier = self._at_rest() - self._before
        self._before += self._barrier
        return self

    def __exit__(self, *_: object) -> None:
        self.sent = max(0, self._at_rest() - self._before - self._barrier)
        self._watching.close()

    def _reading(self, read: Callable[[int, int, Tensor], None]) -> Callable[[int, int, Tensor], None]:
        def counted(pid: int, address: int, into: Tensor) -> None:
            read(pid, address, into)
            self._read += into.nbytes

        return counted

    def _telling(self, tell: Callable[..., dict[int, bytes]]) -> Callable[..., dict[int, bytes]]:
        def counted(neighbours: object, content: bytes, doing: str) -> dict[int, bytes]:
            told = tell(neighbours, content, doing)
            self._read += len(content) * len(told)
            return told

        return counted

    def _at_rest(self) -> int:
        """The bytes sent and read so far, once every rank has come here and nothing is in flight."""
        dist.barrier()
        before, now = -1, sent_bytes() + self._read
        while before != now:
            time.sleep(QUIET_SECONDS)
            before, now = now, sent_bytes() + self._read
        return now


class Collectives:
    """See [Note: collectives]; `counts` is the number of calls by operator, such as ``allreduce_``."""

    def __enter__(self) -> "Collectives":
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profile.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(
            QUIET_SECONDS
        )  # a thread within a collective as torch's profiler stops ends the process (torch 2.13)
        self._profile.__exit__(None, None, None)
        names = (event.name.partition("::") for event in self._profile.events() or ())
        self.counts = dict(Counter(name for family, _, name in names if family in ("c10d", "accel")))


def sent_bytes() -> int:
    """The bytes that the kernel has sent, once, on all TCP connections that this process has open."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            # Several descriptors may be one socket; gloo opens one for each connection, and nothing duplicates them.
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed since it was listed, as the descriptor of the listing itself is
        with connection:
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
                # On a busy machine the kernel sends some data again, taking a process that waits for a core for loss.
                sent, sent_again = struct.unpack_from("QQ", state, _BYTES_SENT_OFFSET)
                total += sent - sent_again
    return total


def resident_bytes() -> int:
    """The resident set of this process now."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The largest resident set of this process since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Let `peak_resident_bytes` start again from what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"Expected a line {key} in /proc/self/status, found none.")
    return int(found[1]) * 1024


def census(
    *,
    module: nn.Module,
    optimizers: Iterable[Optimizer],
    ignore: Iterable[Tensor] = (),
    more: Mapping[str, Iterable[Tensor]] | None = None,
    unseen: int = 0,
) -> dict[str, int]:
    """The bytes that are alive in this process now, by kind; see [Note: bytes at rest].

    Args:
        module: Holds the parameters, and after a backward their gradients.
        optimizers: Hold the optimizer state; what their groups show counts as parameters and gradients too.
        ignore: Tensors that are no peer's, such as the batches.
        more: Tensors by kind that neither the module nor the optimizers show.
        unseen: Bytes of "other" that no Python object shows.
    """
    gc.collect()  # tensors in unreachable cycles are held by nobody
    optimizers = list(optimizers)
    in_groups = (p for opt in optimizers for group in opt.param_groups for p in group["params"])
    parameters = [*module.parameters(), *in_groups]
    counted = set(_storages(ignore))
    result = dict.fromkeys(KINDS, 0)

    def count(kind: str, tensors: Iterable[Tensor]) -> None:
        for key, size in _storages(tensors).items():
            if key not in counted:
                counted.add(key)
                result[kind] += size

    count("parameters", [*parameters, *module.buffers()])
    count("gradients", (p.grad for p in parameters if p.grad is not None))
    count("optimizer", (value for opt in optimizers for value in _tensors_in(opt.state)))
    for kind, tensors in (more or {}).items():
        count(kind, tensors)
    count("other", (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)))
    result["other"] += unseen
    return result


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of the storages under `tensors`, by address."""
    found = {}
    # Not imported here: lightning_accel imports Lightning, which is no part of what torch's own peers take to start.
    ours = sys.modules.get("lightning_accel.core.checkpoint")
    without_memory = () if ours is None else (ours.Shard, ours.StoredTensor)
    for tensor in tensors:
        if isinstance(tensor, without_memory):
            continue
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if local.device.type != "meta":
            # A wrapper around tensors has no memory of its own, and no address; what it wraps is found by itself. So is
            # what a sparse tensor consists of. Parameters that rest sharded have no storage, and refuse.
            with suppress(RuntimeError), torch._C.DisableTorchFunctionSubclass():
                storage = local.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _tensors_in(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors_in(value)
