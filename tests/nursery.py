"""A process that has imported what ranks need, and forks them: a rank starts in milliseconds, where importing torch and
Lightning takes seconds.

Each rank has a nursery of its own, so that what a process draws when it starts (the seed of its hashes, and with it the
order of sets; where its memory lies) differs between ranks, as it does between processes that a launcher starts::

    pytest's process                              a nursery for each rank (`python nursery.py <fd>`)
    Nursery(environment)                    --->  imports torch and Lightning, but nothing of ours
    nursery.start(fd, environment)          --->  forks
                                            <---  the child's number
    child.poll()                            --->  asks the system, as only a parent can
                                            <---  its exit code, or None
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

START_SECONDS = 180.0  # importing torch on a busy machine
_IMPORTED = ("torch.distributed.fsdp", "lightning.pytorch", "lightning.fabric")


class Nursery:
    """Starts processes that have imported what takes long.

    Args:
        environment: What the modules that it imports read; each child gets its own.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for pytest, which then ends it
        )
        theirs.close()

    def start(self, descriptor: int, environment: dict[str, str]) -> Child:
        """Start a process that does the jobs that come through `descriptor` (see `harness.serve`)."""
        self._connection.send((os.getcwd(), environment))
        send_handle(self._connection, descriptor, self._process.pid)
        if not self._connection.poll(START_SECONDS):
            raise TimeoutError(f"No process was started within {START_SECONDS:.0f} s.")
        return Child(self, self._connection.recv())

    def close(self) -> None:
        """End it; its children have connections of their own and live on."""
        self._connection.close()
        self._process.wait()

    def exit_code(self, pid: int) -> int | None:
        """The exit code of a child, the negative of the signal if one has killed it, or None if it is alive."""
        self._connection.send(pid)
        return self._connection.recv()


class Child:
    """A process that a nursery has forked, with a group of its own; what of `subprocess.Popen` the harness needs."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self._nursery = nursery
        self._code: int | None = None

    def poll(self) -> int | None:
        """See `Nursery.exit_code`."""
        if self._code is None:
            self._code = self._nursery.exit_code(self.pid)
        return self._code

    def wait(self, timeout: float = 60.0) -> int:
        """The exit code, as soon as there is one."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Process {self.pid} did not end within {timeout:.0f} s.")
            time.sleep(0.005)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Only while it is alive, or was not asked for its exit code: numbers are used again."""
        os.kill(self.pid, number)


def nurse(connection: Connection) -> int | None:
    """Fork children until the other end of `connection` is closed; returns in each child, with its descriptor."""
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy all that they share
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return None
        if isinstance(asked, int):
            pid, status = os.waitpid(asked, os.WNOHANG)
            connection.send(os.waitstatus_to_exitcode(status) if pid else None)
            continue
        folder, environment = asked
        descriptor = recv_handle(connection)
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            connection.close()
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            return descriptor
        os.setpgid(pid, pid)  # both do it: whoever kills the group finds it, whichever of them is first
        os.close(descriptor)
        connection.send(pid)


if __name__ == "__main__":
    if (descriptor := nurse(Connection(int(sys.argv[1])))) is not None:
        from harness import serve

        serve(descriptor)
