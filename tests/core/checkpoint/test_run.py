"""Whether the process that has signed something is still there."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_accel.core.checkpoint import run as module
from lightning_accel.core.checkpoint.run import is_alive, this_run

SLEEP = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]


def signature_of(pid: int) -> str:
    return module._signature(pid)


def test_this_process_is_alive_and_stays_the_same_run() -> None:
    assert is_alive(this_run()) is True
    assert this_run() == this_run()


@pytest.fixture
def child() -> Any:
    process = subprocess.Popen(SLEEP, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_is_alive_until_it_ends(child: subprocess.Popen[bytes]) -> None:
    run = signature_of(child.pid)
    assert run != this_run()
    assert is_alive(run) is True
    child.kill()
    deadline = time.monotonic() + 30
    while is_alive(run):  # nobody has waited for it: it is a zombie
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert child.returncode is None
    assert is_alive(run) is False
    child.wait()
    assert is_alive(run) is False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs a system that says when a process began")
def test_a_number_that_is_used_again_is_another_process() -> None:
    """Containers that are started again have the same names and numbers."""
    machine, pid, beginning = this_run().split("-")
    assert is_alive(f"{machine}-{pid}-{int(beginning) - 1}") is False
    assert is_alive(f"{machine}-{2**22 + 1}-{beginning}") is False


def test_where_the_system_does_not_say_when_a_process_began(
    monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]
) -> None:
    machine, pid = this_run().split("-")[0], child.pid
    monkeypatch.setattr(module, "_beginning", lambda pid: None)
    module._signature.cache_clear()
    try:
        assert this_run() == this_run()
        assert is_alive(this_run()) is True
        assert is_alive(f"{machine}-{pid}-12ab") is True
        child.kill()
        child.wait()
        assert is_alive(f"{machine}-{pid}-12ab") is False
        assert is_alive(f"{machine}-1-12ab") is True, "another user's"
    finally:
        module._signature.cache_clear()


@pytest.mark.parametrize("run", ["", "None", "12ab34cd56ef", "ffffffff-1-1", "x-y-z", "../..-1-1"])
def test_of_other_machines_and_other_signatures_nothing_is_known(run: str) -> None:
    assert is_alive(run) is None


def sign(queue: Any) -> None:
    queue.put((this_run(), os.getpid(), is_alive(this_run())))


def test_forked_processes_are_runs_of_their_own() -> None:
    this_run()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=sign, args=(queue,))
    process.start()
    run, pid, alive = queue.get(timeout=60)
    process.join()
    assert run != this_run()
    assert f"-{pid}-" in run
    assert alive is True
    assert is_alive(run) is False
