"""Which process writes a checkpoint, so that others can tell whether it still does."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
import uuid
from pathlib import Path


def this_run() -> str:
    """This process, as it signs what it writes. It may be one of several that train together: rank 0's stands for all.

    It is the machine, the process's number, and when it began: numbers are used again.
    """
    return _signature(os.getpid())  # forked processes are runs of their own


@functools.cache
def _signature(pid: int) -> str:
    return f"{_machine()}-{pid}-{_beginning(pid) or uuid.uuid4().hex[:8]}"


def is_alive(run: str) -> bool | None:
    """Whether the process that has signed so is still there; None if it cannot be told, being on another machine."""
    found = re.fullmatch(r"([0-9a-f]+)-(\d+)-([0-9a-f]+)", run)
    if found is None or found[1] != _machine():
        return None
    pid = int(found[2])
    if _beginning(os.getpid()) is not None:
        return _beginning(pid) == found[3]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@functools.cache
def _machine() -> str:
    """One since it was started, and one container of it: where processes' numbers mean the same."""
    found = [socket.gethostname()]
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        try:
            found.append(os.readlink(path) if path.is_symlink() else path.read_text())
        except OSError:  # another system
            found.append("")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:8]


def _beginning(pid: int) -> str | None:
    """When a process began, in ticks since the system was started; None if it has ended, or the system says nothing."""
    try:
        # The second field is the command in parentheses, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie is one that nobody has asked about yet
