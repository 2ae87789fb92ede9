"""What surrounds the ranks: signals, variables, restarts."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_meeting import free_port, part
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from lightning_accel.launching import agent
from lightning_accel.launching.settings import LaunchSettings

HANDLED = "TORCHELASTIC_SIGNALS_TO_HANDLE"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "script.py").touch()
    return str(tmp_path / "script.py")


@pytest.fixture
def heard(number: signal.Signals) -> Iterator[None]:
    """Has a signal taken in, which a shell has what it starts in the background ignore."""
    before = signal.signal(number, signal.SIG_DFL)
    yield
    signal.signal(number, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_while_machines_gather(
    script: str, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    port = free_port()
    settings = LaunchSettings(
        num_machines=3, num_processes=3, main_process_ip="127.0.0.1", main_process_port=port, cpu=True
    )
    variables, handlers = dict(os.environ), [signal.getsignal(each) for each in SIGNALS]
    facts: dict[str, object] = {"num_machines": 3, "num_processes": 3, "max_restarts": 0}
    other = part(1, port, 3, facts=facts)

    def end() -> None:
        while other._store is None:  # it has come
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    ending = threading.Thread(target=end)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.next_rendezvous)
        ending.start()
        with pytest.raises(SignalException) as raised:
            agent.launch(settings, script)
        ending.join()
        with pytest.raises(RendezvousClosedError, match=f"machine 0 has given up: it got {number.name}"):
            waiting.result()
    assert raised.value.sigval is number
    assert dict(os.environ) == variables
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_is_ignored_stays_so(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []

    def launched(*_: object) -> None:
        said.append(os.environ[HANDLED])
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(agent, "_launch", launched)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        agent.launch(LaunchSettings(), script)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "SIGTERM" in said[0]
    assert "SIGHUP" not in said[0]


def test_restarts_of_all_machines_count() -> None:
    meeting = part(0, 0, machines=1)
    spec = WorkerSpec("rank", local_world_size=1, rdzv_handler=meeting, entrypoint="python", max_restarts=3)
    counting = agent._Agent(spec, DefaultLogsSpecs())
    for left in (3, 2, 1):
        counting._rendezvous(counting.get_worker_group())
        assert counting._remaining_restarts == left


def test_ranks_that_are_neither_well_nor_failed(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent._Agent, "run", lambda self: RunResult(WorkerState.UNHEALTHY))
    with pytest.raises(agent.LaunchError, match="The ranks of machine 0 are UNHEALTHY") as raised:
        agent.launch(LaunchSettings(cpu=True), script)
    assert raised.value.code == 1
