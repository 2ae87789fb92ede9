"""Several hosts on one machine: network namespaces, each with a cable of a known rate to one switch. Linux, as root.

::

    namespace HOST-0          namespace HOST-switch          namespace HOST-1
    nic 10.98.0.1 ===cable=== port-0 [bridge] port-1 ===cable=== nic 10.98.0.2

[Note: rate and delay] What a host sends is held back at its own end of the cable (``nic``), what it receives at the
switch's (``port``): so both directions have the rate at once, as with a network card. The rate is kept by the kernel's
token bucket (``tbf``), a delay by ``netem``, half of it on each of the two cables that a packet passes.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import uuid
from types import TracebackType

NIC = "nic"
"""What the network device is called on each host."""

_CLONE_NEWNET = 0x40000000
# A bucket has to last from one of the kernel's ticks to the next, 4 ms at the least frequent of usual settings; and it
# has to take one packet, which may be 64 KB before the card cuts it.
_TICK_SECONDS = 0.004
_LEAST_BURST = 2**18
# How much may wait for the cable: more than one window of any connection, so that nothing is lost.
_QUEUE = "400ms"


class Hosts:
    """Makes the hosts when entered, and takes them away when left.

    Args:
        count: How many, 2 to 254.

    Raises:
        OSError: On entering, if this machine or user cannot make them; it says why.
    """

    def __init__(self, count: int) -> None:
        if not 2 <= count <= 254:
            raise ValueError(f"Expected 2 to 254 hosts, got {count}.")
        stem = f"accel-{uuid.uuid4().hex[:8]}"
        self.names = [f"{stem}-{host}" for host in range(count)]
        """The namespaces' names."""
        self.addresses = [f"10.98.0.{host + 1}" for host in range(count)]
        """IPv4, in the order of the names."""
        self._switch = f"{stem}-switch"
        self._made = contextlib.ExitStack()

    def __enter__(self) -> "Hosts":
        if sys.platform != "linux":
            raise OSError(f"Expected Linux, whose network namespaces are the hosts, got {sys.platform}.")
        for command in ("ip", "tc"):
            if shutil.which(command) is None:
                raise OSError(f"Expected the command `{command}` (Debian: package iproute2), which is not here.")
        with contextlib.ExitStack() as made:
            for name in (self._switch, *self.names):
                _run("ip", "netns", "add", name)
                made.callback(_run, "ip", "netns", "delete", name)
            _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
            for host, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
                port = f"port-{host}"
                cable = ("type", "veth", "peer", "name", NIC, "netns", name)
                _run("ip", "-n", self._switch, "link", "add", port, *cable)
                _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
                _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", NIC)
                for device in (NIC, "lo"):
                    _run("ip", "-n", name, "link", "set", device, "up")
            self._made = made.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._made.close()

    def shape(self, mbit: float | None, delay_ms: float = 0.0) -> None:
        """Give all cables a rate, and all pairs of hosts a delay, from now on; connections stay.

        Args:
            mbit: 10**6 bits a second in each direction; None for as fast as the machine copies.
            delay_ms: From one host to another, one way, in milliseconds.

        Raises:
            ValueError: If the rate is not positive or the delay negative.
            OSError: If this kernel cannot; many have no ``netem``, which delays take.
        """
        if (mbit is not None and not mbit > 0) or delay_ms < 0:
            raise ValueError(f"Expected a positive rate and no negative delay, got {mbit} Mbit/s and {delay_ms} ms.")
        ends = [(name, NIC) for name in self.names]
        ends += [(self._switch, f"port-{host}") for host in range(len(self.names))]
        for namespace, device in ends:
            _shape(namespace, device, mbit, delay_ms / 2)


def _shape(namespace: str, device: str, mbit: float | None, delay_ms: float) -> None:
    with contextlib.suppress(OSError):  # there is none yet
        _run("tc", "-n", namespace, "qdisc", "delete", "dev", device, "root")
    add = ("tc", "-n", namespace, "qdisc", "add", "dev", device)
    parent = ["root"]
    if mbit is not None:
        burst = max(_LEAST_BURST, round(mbit * 1e6 / 8 * _TICK_SECONDS))
        _run(
            *add,
            *parent,
            "handle",
            "1:",
            "tbf",
            "rate",
            f"{round(mbit * 1e6)}bit",
            "burst",
            str(burst),
            "latency",
            _QUEUE,
        )
        parent = ["parent", "1:"]
    if delay_ms:
        # Enough packets for a second of the fastest cable, of the size that connections hand over.
        _run(*add, *parent, "handle", "10:", "netem", "delay", f"{delay_ms}ms", "limit", "100000")


def enter(name: str) -> None:
    """Have this process live on a host: the sockets that it opens from now on are there.

    Call it before any other thread is started: each thread is on a host of its own, those it starts on the same.

    Raises:
        OSError: If there is no such host, or the right to enter it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{name}") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"Could not enter the network namespace {name}: {os.strerror(number)}")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
