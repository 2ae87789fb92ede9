"""Starts a script as a user does and tells what became of it and of its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

FOLDER = Path(__file__).parent
_FROM_OUTSIDE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK")


@dataclass(frozen=True)
class Finished:
    """How a run ended."""

    code: int
    stdout: str
    stderr: str
    left: list[int]
    """Processes of the run that were still there when its first one had ended."""


def run_script(*options: str, launcher: tuple[str, ...] = (), timeout: float = 120.0) -> Finished:
    """Run `train_script.py` with `options` and wait for the process that a user would wait for.

    Raises:
        subprocess.TimeoutExpired: It did not end in time. All of its processes are killed.
    """
    marker = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if name not in _FROM_OUTSIDE}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *launcher, str(FOLDER / "train_script.py"), *options, "--marker", marker]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
        return Finished(process.returncode, stdout, stderr, _marked(marker))
    finally:
        for pid in _marked(marker):
            os.kill(pid, signal.SIGKILL)


def _marked(marker: str) -> list[int]:
    """Processes that have the marker in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if marker in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found
