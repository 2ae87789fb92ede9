"""Where the machines of a launch meet: a rendezvous for torchrun's elastic agent.

torch's own ``static`` rendezvous, which has a rank for each machine as Accelerate's users know it, waits without saying
for whom, has a machine run on when another one fails, and hands the workers of a second attempt the store of the first,
with the addresses of ranks that are dead. So this is one of our own::

    machine 0                                       machine 1
    opens the store at main_process_port   <------  connects, tries again until it is there
    settings of machine 0                  ------>  compares
    arrived/0                              <----->  arrived/1          each attempt; both wait for all
begun                                                              a launch that comes later is another one
    ... ranks run; every poll looks for ...
    attempt                                <----->  a machine asks for the next attempt: the others join it
    failed/0                               <----->  a machine gives up: the others end, too

[Note: the port of an attempt]
The workers of the first attempt use the same store, so that ``MASTER_PORT`` is the port that was asked for. Those of
another attempt get a store of their own on machine 0, at any port that is free: keys of dead ranks are in the first.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)
from typing_extensions import override

_PREFIX = "accel_launch"
_ANSWER = timedelta(seconds=60)
"""What one request to the store may take: it is on another machine, which may be busy."""
_POLL_S = 0.1
_CONNECT_S = 2.0
_SILENT_S = 90.0
"""A machine that has said nothing for so long is gone. Its agent speaks at each look at its ranks, and ends those of an
attempt, which takes half a minute if they do not want to, without looking."""
_LISTEN_S = 3.0
"""How often each machine listens to all others: what that costs machine 0 grows with the square of their number."""
_FAREWELL_S = 5.0
"""How long a machine that has failed waits for the others to have seen it: the store ends with machine 0."""


class Meeting(RendezvousHandler):
    """One machine's part of it.

    Args:
        address: Of machine 0, as all machines reach it.
        port: There; 0 for any that is free, on one machine.
        rank: This machine's.
        machines: How many there are.
        facts: What must be the same on all machines, by name.
        join_timeout: Seconds to wait for the others.

    Raises:
        ValueError: If the port is in use.

    """

    def __init__(
        self, address: str, port: int, *, rank: int, machines: int, facts: dict[str, object], join_timeout: float
    ) -> None:
        self.address = address
        self.rank = rank
        self.machines = machines
        self.attempt = -1
        """Of the ranks that run now, from 0; the same on all machines."""
        self._facts = facts
        self._join_timeout = join_timeout
        self._worker_store: dist.TCPStore | None = None
        self._ended = False
        self._heard: dict[int, tuple[float, str]] = {}
        """When each of the others was last found to have spoken, and what it said."""
        self._listens_at = 0.0
        if rank == 0 and port:
            require_free(port)
        self._server = self._open(port) if rank == 0 else None
        self.port = port if self._server is None else self._server.port
        self._store: dist.Store | None = None

    def fail(self, message: str) -> dict[int, str]:
        """Tell the other machines that this one gives up, and wait a little until they have seen it.

        Args:
            message: Why.

        Returns:
            What other machines have said before they gave up, by machine.

        """
        self._ended = True
        if self._store is None or self.machines == 1:
            return {}
        with contextlib.suppress(RendezvousClosedError):  # machine 0 has ended
            self._set(f"failed/{self.rank}", message)
            self._set("failed", "")
            self._wait_for_others("failed/{}", "seen/{}", seconds=_FAREWELL_S)
            return self._failures()
        return {}

    @override
    def get_backend(self) -> str:
        return "accel"

    @property
    @override
    def use_agent_store(self) -> bool:
        return True

    @override
    def get_run_id(self) -> str:
        return "accel"

    @override
    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all machines; the ranks of one attempt start together.

        Raises:
            ValueError: If a machine does not come in time, another one has this machine's rank, its settings differ, or
                there is a launch at this address that runs already.
            RendezvousClosedError: If another machine has given up.

        """
        if self._store is None:
            self._store = self._join()
        attempt = self.attempt + 1
        self._set(f"attempt/{attempt}", "")
        self._wait_for_all(attempt)
        self.attempt = attempt
        self._heard.clear()  # while they gathered nobody listened
        if attempt == 0:
            info = RendezvousStoreInfo(self.address, self.port)
        else:  # see [Note: the port of an attempt]
            if self.rank == 0:
                self._worker_store = self._open(0)
                self._set(f"port/{attempt}", str(self._worker_store.port))
            info = RendezvousStoreInfo(self.address, int(self._get(f"port/{attempt}")))
        return RendezvousInfo(dist.PrefixStore(str(attempt), self._store), self.rank, self.machines, info)

    @override
    def num_nodes_waiting(self) -> int:
        """1 if another machine starts its ranks again: this one does, too.

        Raises:
            RendezvousClosedError: If another machine has given up or says nothing any more, or machine 0 has ended.

        """
        if self.machines == 1:
            return 0
        self._look()
        self._listen()
        return int(self._has(f"attempt/{self.attempt + 1}"))

    @override
    def is_closed(self) -> bool:
        return self._ended

    @override
    def set_closed(self) -> None:
        self._ended = True

    @override
    def shutdown(self) -> bool:
        """Wait until the other machines have ended, as the store ends with machine 0.

        Raises:
            RendezvousClosedError: If one of them gives up, or says nothing any more.

        """
        if self._ended or self._store is None or self.machines == 1:
            return True
        self._ended = True
        self._set(f"done/{self.rank}", "")
        while any(not self._has(f"done/{machine}") for machine in self._others):
            self._look()
            self._listen()
            time.sleep(_POLL_S)
        if self.rank == 0:
            self._wait_for_others("gone/{}", seconds=_FAREWELL_S)
        else:
            with contextlib.suppress(RendezvousClosedError):  # machine 0 has waited long enough
                self._set(f"gone/{self.rank}", "")
        return True

    def _open(self, port: int) -> dist.TCPStore:
        try:
            return dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=_ANSWER)
        except RuntimeError as error:
            raise ValueError(
                f"Expected port {port} to be free for the machines to meet at: {_first_line(error)}"
            ) from error

    def _join(self) -> dist.Store:
        deadline = time.monotonic() + self._join_timeout
        if self._server is not None:
            store: dist.Store = self._server
        else:
            self._wait_for_machine_0(deadline)
            store = self._connect()
        self._store = store = dist.PrefixStore(_PREFIX, store)
        if self._has("begun"):
            self._store = None  # nobody there is to hear of this machine
            raise ValueError(
                f"Expected a launch that still gathers at {self.address} port {self.port}, got one that runs; choose"
                " another --main_process_port."
            )
        if store.add(f"came/{self.rank}", 1) > 1:
            raise ValueError(
                f"Expected each machine to have a rank of its own, got machine_rank={self.rank} twice. Give each"
                f" another --machine_rank, 0 to {self.machines - 1}."
            )
        if self.rank == 0:
            self._set("facts", json.dumps(self._facts))
            return store
        theirs = json.loads(self._get("facts"))
        different = [name for name, value in self._facts.items() if theirs.get(name) != value]
        if different:
            raise ValueError(
                f"Expected the settings of machine 0 on each, got"
                f" {', '.join(f'{name}={self._facts[name]} (there: {theirs.get(name)})' for name in different)} on"
                f" machine {self.rank}."
            )
        return store

    def _connect(self) -> dist.TCPStore:
        try:
            return dist.TCPStore(self.address, self.port, is_master=False, wait_for_workers=False, timeout=_ANSWER)
        except RuntimeError as error:
            raise ValueError(
                f"Expected accel launch of machine 0 at {self.address} port {self.port}, but something else answers:"
                f" {_first_line(error)}"
            ) from error

    def _wait_for_machine_0(self, deadline: float) -> None:
        while True:
            try:
                socket.create_connection((self.address, self.port), timeout=_CONNECT_S).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"Expected machine 0 to be at {self.address} port {self.port} within"
                        f" {self._join_timeout:g} seconds, but it has not come: {error}. Run accel launch there, with"
                        " --machine_rank 0; --join_timeout says how long to wait."
                    ) from error
            time.sleep(_POLL_S)

    def _wait_for_all(self, attempt: int) -> None:
        self._set(f"arrived/{attempt}/{self.rank}", "")
        # Ranks of an attempt before are ended first, which may take its time.
        seconds = self._join_timeout if attempt == 0 else max(self._join_timeout, _SILENT_S)
        deadline = time.monotonic() + seconds
        while missing := [m for m in range(self.machines) if not self._has(f"arrived/{attempt}/{m}")]:
            self._look()
            for machine in missing:
                if self._has(f"done/{machine}"):
                    raise RendezvousClosedError(f"the ranks of machine {machine} have finished: none starts again")
            if time.monotonic() > deadline:
                raise ValueError(
                    f"Expected {self.machines} machines within {seconds:g} seconds, but {_name(missing)} of"
                    f" 0 to {self.machines - 1} {'has' if len(missing) == 1 else 'have'} not come to {self.address}"
                    f" port {self.port}. Run accel launch there; --join_timeout says how long to wait."
                )
            time.sleep(_POLL_S)
        if self.rank == 0 and attempt == 0:
            self._set("begun", "")

    def _look(self) -> None:
        """Say that this machine is there, and raise if another one has given up."""
        self._set(f"alive/{self.rank}", str(time.monotonic()))
        failed = self._failures() if self._has("failed") else {}
        if failed:
            self._set(f"seen/{self.rank}", "")
        for machine, message in failed.items():
            raise RendezvousClosedError(f"machine {machine} has given up: {message}")

    def _listen(self) -> None:
        """Raise if another machine, which has not finished, has said nothing for long."""
        now = time.monotonic()
        if now < self._listens_at:
            return
        self._listens_at = now + _LISTEN_S
        for machine in self._others:
            beat = self._get(f"alive/{machine}") if self._has(f"alive/{machine}") else ""
            since, last = self._heard.get(machine, (now, ""))
            if machine not in self._heard or beat != last:
                self._heard[machine] = now, beat
            elif now - since > _SILENT_S and not self._has(f"done/{machine}"):
                raise RendezvousClosedError(f"machine {machine} has said nothing for {now - since:.0f} seconds")

    @property
    def _others(self) -> list[int]:
        return [machine for machine in range(self.machines) if machine != self.rank]

    def _failures(self) -> dict[int, str]:
        return {machine: self._get(f"failed/{machine}") for machine in self._others if self._has(f"failed/{machine}")}

    def _wait_for_others(self, *keys: str, seconds: float) -> None:
        """Until each other machine that has come has set any of these, or time is up."""
        deadline = time.monotonic() + seconds
        others = [m for m in range(self.machines) if m != self.rank and self._has(f"came/{m}")]
        while time.monotonic() < deadline:
            if all(any(self._has(key.format(machine)) for key in keys) for machine in others):
                return
            time.sleep(_POLL_S)

    def _has(self, key: str) -> bool:
        with _asking():
            return self._reached.check([key])

    def _get(self, key: str) -> str:
        with _asking():
            return self._reached.get(key).decode()

    def _set(self, key: str, value: str) -> None:
        with _asking():
            self._reached.set(key, value)

    @property
    def _reached(self) -> dist.Store:
        assert self._store is not None
        return self._store


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Around requests to the store."""
    try:
        yield
    except RuntimeError as error:
        raise RendezvousClosedError(
            f"machine 0 has ended, or cannot be reached any more: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    """Without the frames of C++ that torch adds."""
    return str(error).partition("\n")[0]


def require_free(port: int) -> None:
    """Raise if another program of this machine listens at a port.

    Raises:
        ValueError: If it does, or the port is not for this user.

    """
    with socket.socket() as probe:
        # As servers do: connections of one that has ended linger, and are no reason to refuse.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            why = "another program uses it" if error.errno == errno.EADDRINUSE else str(error)
            raise ValueError(
                f"Expected main_process_port {port} to be free, but {why}. Choose another one; on a single machine"
                " leave it out, and any that is free is taken."
            ) from error


def _name(machines: Iterable[int]) -> str:
    numbers = [str(machine) for machine in machines]
    return f"machine {numbers[0]}" if len(numbers) == 1 else f"machines {', '.join(numbers)}"
