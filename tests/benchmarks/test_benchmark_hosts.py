"""Hosts share no sockets, reach each other over the cable, have the rate that was asked for, and leave nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from benchmarks.hosts import NIC, Hosts, enter


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(Hosts(3))
        except OSError as error:
            pytest.skip(str(error))
        yield made


def on(host: str, function: Any, *arguments: Any) -> threading.Thread:
    """Begin a function in a thread that lives on a host."""

    def work() -> None:
        enter(host)
        function(*arguments)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def answer(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(connection.recv(64).upper())


def test_hosts_reach_each_other_and_share_nothing(hosts: Hosts) -> None:
    found: dict[str, Any] = {}

    def listen() -> None:
        found["server"] = socket.create_server((hosts.addresses[0], 5000))
        try:
            socket.create_server((hosts.addresses[1], 5000))
        except OSError as error:
            found["not its own"] = error

    def call() -> None:
        with socket.create_connection((hosts.addresses[0], 5000), timeout=10) as connection:
            connection.sendall(b"hello")
            found["answer"] = connection.recv(64)

    on(hosts.names[0], listen).join()
    threads = [threading.Thread(target=answer, args=[found["server"]]), on(hosts.names[2], call)]
    threads[0].start()
    for thread in threads:
        thread.join()
    found["server"].close()
    assert found["answer"] == b"HELLO"
    assert "not its own" in found


def rates(name: str, device: str) -> list[int]:
    """What the kernel says, in bytes per second."""
    shown = subprocess.run(["tc", "-j", "-n", name, "qdisc", "show", "dev", device], capture_output=True, check=True)
    return [one["options"]["rate"] for one in json.loads(shown.stdout) if one["kind"] == "tbf"]


def test_both_ends_of_each_cable_have_the_rate_until_it_is_changed(hosts: Hosts) -> None:
    switch = hosts.names[0].rpartition("-")[0] + "-switch"
    ends = [(name, NIC) for name in hosts.names] + [(switch, f"port-{number}") for number in range(3)]
    for mbit, expected in ((100.0, [12_500_000]), (2500.0, [312_500_000]), (None, [])):
        hosts.shape(mbit)
        assert [rates(*end) for end in ends] == [expected] * 6


def test_a_delay_is_there_or_an_error_says_that_the_kernel_cannot(hosts: Hosts) -> None:
    failure: str | None = None
    try:
        hosts.shape(100.0, delay_ms=3.0)
    except OSError as error:
        failure = str(error)
    shown = subprocess.run(["tc", "-n", hosts.names[0], "qdisc", "show", "dev", NIC], capture_output=True, text=True)
    assert "delay 1.5ms" in (failure or shown.stdout)


def test_nothing_is_left(hosts: Hosts) -> None:
    def namespaces() -> set[str]:
        shown = subprocess.run(["ip", "-j", "netns", "list"], capture_output=True, check=True)
        return {one["name"] for one in json.loads(shown.stdout or "[]")}

    with Hosts(2) as others:
        assert {*others.names, *hosts.names} <= namespaces()
    assert not namespaces() & set(others.names)


@pytest.mark.parametrize("count", [1, 255])
def test_numbers_of_hosts(count: int) -> None:
    with pytest.raises(ValueError, match=f"Expected 2 to 254 hosts, got {count}"):
        Hosts(count)


@pytest.mark.parametrize(("mbit", "delay"), [(0.0, 0.0), (-1.0, 0.0), (1.0, -1.0)])
def test_rates_and_delays(mbit: float, delay: float) -> None:
    with pytest.raises(ValueError, match="Expected a positive rate and no negative delay"):
        Hosts(2).shape(mbit, delay)


def test_a_host_that_is_not_there() -> None:
    with pytest.raises(OSError, match="accel-nowhere"):
        enter("accel-nowhere")
