"""Runs a script in all ranks of this machine, by torchrun's elastic agent."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError
from typing_extensions import override

from lightning_accel.launching.deepspeed import require_sound
from lightning_accel.launching.environment import environment, threads
from lightning_accel.launching.failure import first_failure
from lightning_accel.launching.meeting import Meeting
from lightning_accel.launching.settings import LaunchSettings
from lightning_accel.variables import LAUNCHER

_PORT = 29_500
"""Where several machines meet if nothing else is said: as with torchrun and Accelerate."""
_HANDLED = "TORCHELASTIC_SIGNALS_TO_HANDLE"
"""The variable of torch's with the signals that end the ranks."""
_MONITOR_S = 0.2
_BARRIER_S = 1.0
"""How long the agent waits for other machines that have not finished. After that the meeting does, which sees it if one
of them fails."""


class _Agent(LocalElasticAgent):
    """One that counts the restarts of all machines: torch's counts those that it begins itself."""

    @override
    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        meeting = worker_group.spec.rdzv_handler
        assert isinstance(meeting, Meeting)
        self._remaining_restarts = worker_group.spec.max_restarts - meeting.attempt


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
        ValueError: If there is no such script, a DeepSpeed file is not accepted, the port is in use, or a machine does
            not come.
        FileNotFoundError: If there is no such DeepSpeed file.
        LaunchError: If a rank fails.
        SignalException: If this process is told to end. The ranks have been. In a thread other than the main one
            signals go where they went.

    """
    _require_exists(target, module)
    gpus = torch.cuda.device_count()
    _quieten()
    with _environment_returns(), _signals_raise():
        _launch(settings, gpus, _command(target, arguments, module))


def _launch(settings: LaunchSettings, gpus: int, command: tuple[str, ...]) -> None:
    ranks = settings.local_processes(gpus)
    if settings.deepspeed_config is not None:
        require_sound(settings.deepspeed_config, ranks * settings.num_machines)
    several = settings.num_machines > 1
    meeting = Meeting(
        str(settings.main_process_ip) if several else "127.0.0.1",
        settings.main_process_port or (_PORT if several else 0),
        rank=settings.machine_rank,
        machines=settings.num_machines,
        facts={
            "num_machines": settings.num_machines,
            "num_processes": ranks * settings.num_machines,
            "max_restarts": settings.max_restarts,
        },
        join_timeout=settings.join_timeout,
    )
    os.environ.update(environment(settings, ranks) | {LAUNCHER: str(os.getpid())})
    number = threads(settings, ranks, on_cpu=settings.cpu or not gpus)
    if number is not None:
        os.environ["OMP_NUM_THREADS"] = str(number)
    with tempfile.TemporaryDirectory(prefix="accel_launch_") as folder:
        _run(settings, meeting, ranks, command, folder)


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
    agent = _Agent(spec, DefaultLogsSpecs(log_dir=folder), exit_barrier_timeout=_BARRIER_S)
    try:
        result = agent.run()
        if result.state is not WorkerState.SUCCEEDED:
            if not result.failures:
                said = f"The ranks of machine {settings.machine_rank} are {result.state.value}: see above"
                raise LaunchError(_report(said, meeting.fail(said)), 1)
            failure = first_failure(result.failures)
            headline = failure.headline()
            raise LaunchError(_report(headline, meeting.fail(headline), failure.traceback), failure.exit_code)
        meeting.shutdown()
    except RendezvousClosedError as error:
        raise LaunchError(f"Machine {settings.machine_rank} ends, as {error}", 1) from error
    except (ValueError, SignalException) as error:
        meeting.fail(str(error))
        raise


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Have signals that end a program raise SignalException, also while machines gather, and not only from then on.

    What is ignored stays so, as after nohup. Afterwards all is as it was.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    named = os.environ.get(_HANDLED, "SIGTERM,SIGINT,SIGHUP,SIGQUIT").split(",")
    numbers = [getattr(signal, name.strip()) for name in named if hasattr(signal, name.strip())]
    found = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    os.environ[_HANDLED] = ",".join(number.name for number in before)
    try:
        for number in before:
            signal.signal(number, _raise)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    raise SignalException(f"it got {signal.Signals(number).name}", signal.Signals(number))


@contextlib.contextmanager
def _environment_returns() -> Iterator[None]:
    """Have the variables as they were before."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in {*before, *os.environ}:
            if name not in before:
                del os.environ[name]
            elif os.environ.get(name) != before[name]:
                os.environ[name] = before[name]


def _report(headline: str, others: Mapping[int, str], traceback: str = "") -> str:
    lines = [headline, *(f"Machine {machine} says: {said}" for machine, said in others.items())]
    return "\n".join([*lines, traceback.rstrip()]).rstrip()


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
    if path.suffix == ".pyc" or zipfile.is_zipfile(path):
        raise ValueError(
            f"Expected Python's source in {target}, got what is {'compiled' if path.suffix == '.pyc' else 'zipped'}."
            " Name the source, or a module with --module if it can be imported."
        )


def _quieten() -> None:
    """Leave it to this package to say what has happened; LOGLEVEL has torchrun's own messages back."""
    if "LOGLEVEL" not in os.environ:
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
