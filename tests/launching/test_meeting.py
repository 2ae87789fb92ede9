"""Machines that meet: threads here, each with a part of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousInfo

from lightning_accel.launching.meeting import Meeting

FACTS: dict[str, object] = {"num_machines": 2, "num_processes": 4}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def part(rank: int, port: int, machines: int = 2, timeout: float = 20.0, facts: dict[str, object] = FACTS) -> Meeting:
    return Meeting("127.0.0.1", port, rank=rank, machines=machines, facts=facts, join_timeout=timeout)


def at_once(*calls: Callable[[], Any]) -> list[Future[Any]]:
    """Each in a thread; all have ended."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [pool.submit(call) for call in calls]


def met() -> tuple[Meeting, Meeting]:
    port = free_port()
    parts = part(0, port), part(1, port)
    for future in at_once(*(each.next_rendezvous for each in parts)):
        future.result()
    return parts


def test_two_machines_meet() -> None:
    port = free_port()
    parts = part(0, port), part(1, port)
    infos: list[RendezvousInfo] = [future.result() for future in at_once(*(each.next_rendezvous for each in parts))]
    assert [(info.rank, info.world_size) for info in infos] == [(0, 2), (1, 2)]
    for info in infos:
        assert info.bootstrap_store_info is not None
        assert (info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port) == ("127.0.0.1", port)
    infos[0].store.set("key", "value")
    assert infos[1].store.get("key") == b"value"
    assert [each.num_nodes_waiting() for each in parts] == [0, 0]
    assert [future.result() for future in at_once(*(each.shutdown for each in parts))] == [True, True]


def test_another_attempt_has_another_store() -> None:
    first, second = met()
    starting = threading.Thread(target=first.next_rendezvous)  # its ranks have failed
    starting.start()
    while second.num_nodes_waiting() == 0:
        pass
    info = second.next_rendezvous()
    starting.join()
    assert (first.attempt, second.attempt) == (1, 1)
    assert info.bootstrap_store_info is not None
    assert info.bootstrap_store_info.master_port not in (0, first.port)
    assert second.num_nodes_waiting() == first.num_nodes_waiting() == 0


def test_a_machine_that_gives_up_ends_the_others() -> None:
    first, second = met()
    giving_up = threading.Thread(target=second.fail, args=("Rank 3 failed: KeyError",))
    giving_up.start()

    def run() -> None:
        while True:
            first.num_nodes_waiting()

    with pytest.raises(RendezvousClosedError, match="machine 1 has given up: Rank 3 failed: KeyError"):
        run()
    giving_up.join()
    assert first.fail("so does this one") == {1: "Rank 3 failed: KeyError"}


def test_a_machine_that_has_finished_sees_another_fail() -> None:
    first, second = met()
    finished, _ = at_once(first.shutdown, lambda: second.fail("Rank 3 failed"))
    assert isinstance(finished.exception(), RendezvousClosedError)


def test_none_starts_again_when_one_has_finished() -> None:
    first, second = met()
    ending = threading.Thread(target=first.shutdown, daemon=True)
    ending.start()
    with pytest.raises(RendezvousClosedError, match="the ranks of machine 0 have finished"):
        second.next_rendezvous()
    second.shutdown()
    ending.join()


def test_machines_that_never_come() -> None:
    port = free_port()
    with pytest.raises(ValueError, match="Expected machine 0 to be at 127.0.0.1 port .* within 0.3 seconds"):
        part(1, port, timeout=0.3).next_rendezvous()
    parts = [part(rank, port, machines=4, timeout=0.5) for rank in (0, 2)]
    for future in at_once(*(each.next_rendezvous for each in parts)):
        assert "Expected 4 machines within 0.5 seconds, but machines 1, 3 of 0 to 3 have not" in str(future.exception())


def test_two_machines_of_one_rank() -> None:
    port = free_port()
    parts = part(0, port, 3, timeout=1.0), part(1, port, 3, timeout=1.0), part(1, port, 3, timeout=1.0)
    said = " ".join(str(future.exception()) for future in at_once(*(each.next_rendezvous for each in parts)))
    assert "Expected each machine to have a rank of its own, got machine_rank=1 twice" in said


def test_another_launch_at_the_place_of_one_that_runs() -> None:
    first, second = met()
    stray = part(1, first.port)
    with pytest.raises(
        ValueError, match=f"launch that still gathers at 127.0.0.1 port {first.port}, got one that runs"
    ):
        stray.next_rendezvous()
    assert stray.fail("nobody hears it") == {}
    assert first.num_nodes_waiting() == second.num_nodes_waiting() == 0


def test_a_machine_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_accel.launching.meeting._SILENT_S", 0.6)
    monkeypatch.setattr("lightning_accel.launching.meeting._LISTEN_S", 0.05)
    first, second = met()
    begin = time.monotonic()
    while time.monotonic() < begin + 1.0:
        assert first.num_nodes_waiting() == second.num_nodes_waiting() == 0

    def run() -> None:
        while time.monotonic() < begin + 10.0:
            first.num_nodes_waiting()

    with pytest.raises(RendezvousClosedError, match="machine 1 has said nothing"):
        run()


def test_machines_that_were_told_otherwise() -> None:
    port = free_port()
    parts = part(0, port, timeout=1.0), part(1, port, timeout=1.0, facts=FACTS | {"num_processes": 6})
    _, other = at_once(*(each.next_rendezvous for each in parts))
    assert "got num_processes=6 (there: 4) on machine 1" in str(other.exception())


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"Expected main_process_port {port} to be free, but another program uses"):
            part(0, port)


def test_alone() -> None:
    meeting = part(0, 0, machines=1)
    info = meeting.next_rendezvous()
    assert info.bootstrap_store_info is not None
    assert info.bootstrap_store_info.master_port == meeting.port != 0
    assert meeting.num_nodes_waiting() == 0
    assert meeting.fail("nobody hears it") == {}
    assert meeting.shutdown()
