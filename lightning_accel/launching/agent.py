"""Runs a script in all ranks of this machine, by torchrun's elastic agent."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from lightning_accel.launching.environment import environment, threads
from lightning_accel.launching.failure import Failure, first_failure
from lightning_accel.launching.meeting import Meeting
from lightning_accel.launching.settings import LaunchSettings

_PORT = 29_500
"""Where several machines meet if nothing else is said: as with torchrun and Accelerate."""
_MONITOR_S = 0.2
_BARRIER_S = 1.0
"""How long the agent waits for other machines that have not finished. After that the meeting does, which sees it if one
of them fails."""


class LaunchError(Exception):
    """A rank has failed, on this machine or another.

    Args:
        message: What happened.
        code: What to exit with.

    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def launch(settings: LaunchSettings, target: str, arguments: Sequence[str] = (), *, module: bool = False) -> None:
    """Run a script in all ranks of this machine, and wait for them and for the other machines.

    Args:
        settings: How.
        target: A Python file, or the name of a module.
        arguments: What the script is given.
        module: Whether ``target`` is a module, as with ``python -m``.

    Raises:
        ValueError: If there is no such script, the port is in use, or a machine does not come.
        LaunchError: If a rank fails.
        SignalException: If this process is told to end. The ranks have been.

    """
    _require_exists(target, module)
    gpus = torch.cuda.device_count()
    ranks = settings.local_processes(gpus)
    _quieten()
    several = settings.num_machines > 1
    meeting = Meeting(
        str(settings.main_process_ip) if several else "127.0.0.1",
        settings.main_process_port or (_PORT if several else 0),
        rank=settings.machine_rank,
        machines=settings.num_machines,
        facts={"num_machines": settings.num_machines, "num_processes": ranks * settings.num_machines},
        join_timeout=settings.join_timeout,
    )
    os.environ.update(environment(settings, ranks))
    number = threads(settings, ranks, on_cpu=settings.cpu or not gpus)
    if number is not None:
        os.environ["OMP_NUM_THREADS"] = str(number)
    with tempfile.TemporaryDirectory(prefix="accel_launch_") as folder:
        _run(settings, meeting, ranks, _command(target, arguments, module), folder)


def _run(settings: LaunchSettings, meeting: Meeting, ranks: int, command: tuple[str, ...], folder: str) -> None:
    spec = WorkerSpec(
        role="rank",
        local_world_size=ranks,
        rdzv_handler=meeting,
        entrypoint=sys.executable,
        args=command,
        max_restarts=settings.max_restarts,
        monitor_interval=_MONITOR_S,
    )
    agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder), exit_barrier_timeout=_BARRIER_S)
    try:
        result = agent.run()
        if result.is_failed():
            failure = first_failure(result.failures)
            raise LaunchError(_report(failure, meeting.fail(failure.headline())), failure.exit_code)
        meeting.shutdown()
    except RendezvousClosedError as error:
        raise LaunchError(f"Machine {settings.machine_rank} ends, as {error}", 1) from error
    except (ValueError, SignalException) as error:
        meeting.fail(str(error))
        raise


def _report(failure: Failure, others: Mapping[int, str]) -> str:
    lines = [failure.headline(), *(f"Machine {machine} says: {said}" for machine, said in others.items())]
    return "\n".join([*lines, failure.traceback.rstrip()]).rstrip()


def _command(target: str, arguments: Sequence[str], module: bool) -> tuple[str, ...]:
    kind = "module" if module else "script"
    # The agent puts the local rank in place of ${local_rank}, for which a script of ours has LOCAL_RANK.
    given = [text.replace("$", "$$") for text in (target, *arguments)]
    return "-u", "-m", f"{__package__}.bootstrap", kind, *given


def _require_exists(target: str, module: bool) -> None:
    if module:
        return  # to find it is to import the packages that it is in: the ranks do
    path = Path(target)
    if path.is_dir():
        raise ValueError(f"Expected a Python file, got the folder {target}. Name the script in it.")
    if not path.is_file():
        raise ValueError(f"Expected a Python file at {target}, found nothing. A module's name goes with --module.")


def _quieten() -> None:
    """Leave it to this package to say what has happened; LOGLEVEL has torchrun's own messages back."""
    if "LOGLEVEL" not in os.environ:
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
