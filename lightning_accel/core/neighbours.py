"""Connections between the ranks of one machine: who they are, small messages, and word when one of them ends.

[Note: no blocking in C++]
A thread that waits inside torch (for a work of gloo, say) cannot be stopped: at exit Python ends it within a C++
destructor, which aborts the process, and torch's own bookkeeping of works is not safe to use from a second thread
while a profiler runs (torch 2.13 crashed). So the thread that serves direct reads waits only in Python's own sockets,
and closing them wakes it up.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta

from lightning_accel.core.collectives import Collectives
from lightning_accel.core.groups import timeout_of

_NUMBER = struct.Struct("=Q")
LONGEST = 2**16
"""Bytes of what is told at once, at most: a third of what Linux's sockets take."""
_NAME = 256
"""Bytes of what it is for, at most."""
_CREDENTIALS = struct.Struct("=3i")  # process, user, group


class Neighbours:
    """One socket to each other rank, all on this machine.

    Args:
        lines: Sockets to the other ranks, by rank.
        pids: Their process numbers, by rank, as this process sees them.
        timeout: How long to wait for a message.

    """

    def __init__(self, lines: dict[int, socket.socket], pids: dict[int, int], timeout: timedelta) -> None:
        self.pids = pids
        self._lines = dict(sorted(lines.items()))
        self._timeout_s = timeout.total_seconds()
        for line in lines.values():
            line.settimeout(self._timeout_s)

    @staticmethod
    def connect(base: Collectives) -> Neighbours | None:
        """Connect all ranks to each other, or none of them. All must ask together.

        Returns:
            None if any two ranks do not share a machine (to be exact: a network namespace), or it is not Linux.

        """
        lines: dict[int, socket.socket] = {}
        listener: socket.socket | None = None
        try:
            if sys.platform == "linux":
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                # The first byte keeps the name out of the file system; it ends with the socket.
                listener.bind("\0lightning-accel-" + secrets.token_hex(16))
                listener.listen(base.ranks)
            names = base.gather_objects(listener.getsockname() if listener is not None else None)
            complete = _connect_to(names[: base.rank], lines)
            if not all(base.gather_objects(complete)):
                for line in lines.values():
                    line.close()
                return None
            assert listener is not None
            # They have connected by now, in any order: each says who it is.
            callers = [listener.accept()[0] for _ in range(base.ranks - base.rank - 1)]
        finally:
            if listener is not None:
                listener.close()
        for line in lines.values():
            line.send(_NUMBER.pack(base.rank))
        for line in callers:
            lines[_NUMBER.unpack(line.recv(_NUMBER.size))[0]] = line
        return Neighbours(
            lines, {rank: _process(line) for rank, line in lines.items()}, timeout_of(base.group, base.device)
        )

    def meet(self, number: int, doing: str) -> dict[int, int]:
        """Tell all others a number and wait for theirs, by rank.

        Args:
            number: Of 64 bits.
            doing: What it is for; the same on every rank.

        Raises:
            RuntimeError: If one of them has ended, does something else, or does not answer in time.

        """
        told = self.exchange(_NUMBER.pack(number), doing)
        return {rank: _NUMBER.unpack(number)[0] for rank, number in told.items()}

    def exchange(self, content: bytes, doing: str) -> dict[int, bytes]:
        """Tell all others something and wait for what they tell, by rank.

        Args:
            content: As long on every rank, at most ``LONGEST`` bytes.
            doing: What it is for; the same on every rank.

        Raises:
            RuntimeError: If one of them has ended, does something else, or does not answer in time.

        """
        assert len(content) <= LONGEST
        name = doing.encode()
        message = bytes([len(name)]) + name + content
        told: dict[int, bytes] = {}
        for rank, line in self._lines.items():
            with _explained(rank, self._timeout_s):
                line.send(message)
        for rank, line in self._lines.items():
            with _explained(rank, self._timeout_s):
                answer = line.recv(len(message) + _NAME)
                if not answer:
                    raise ConnectionResetError
            theirs, told[rank] = answer[1 : 1 + answer[0]], answer[1 + answer[0] :]
            if theirs != name:
                raise RuntimeError(
                    f"Expected rank {rank} to come to {doing} as this one does; it came to {theirs.decode()}. Call"
                    " backward, optimizer.step() and the like equally often, and in the same order, on every rank."
                )
            if len(told[rank]) != len(content):
                raise RuntimeError(
                    f"Expected the ranks to train the same parameters, but for {doing} rank {rank} tells of"
                    f" {len(told[rank])} and this one of {len(content)}. Build and change the model in the same way on"
                    " every rank."
                )
        return told

    def close(self) -> None:
        """Hang up. Who waits for a message, here or there, is told at once; what was sent before still arrives."""
        for line in self._lines.values():
            with contextlib.suppress(OSError):  # the other side was first
                line.shutdown(socket.SHUT_RDWR)
            line.close()


@contextlib.contextmanager
def _explained(rank: int, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise RuntimeError(
            f"Expected rank {rank} to answer within {timeout_s:.0f} s, the process group's timeout; it did not."
        ) from None
    except OSError as error:
        raise RuntimeError(f"Connection closed by peer: rank {rank} has ended or given up.") from error


def _connect_to(names: Sequence[bytes | None], lines: dict[int, socket.socket]) -> bool:
    for rank, name in enumerate(names):
        if name is None:
            return False
        line = lines[rank] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            line.connect(name)
        except OSError:
            return False
    return True


def _process(line: socket.socket) -> int:
    credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(credentials)[0]
    return pid
