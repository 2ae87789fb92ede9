"""The processes that every multi-process test shares.

A set of ranks is started once and then runs one function after another, so a test pays milliseconds for its process
group. Neither it nor a set of other size or one that follows a failure pays the seconds that importing torch and
Lightning takes: ranks are forked by a process that has done so (see `nursery`)::

    pytest's process                            a worker for each rank
                                          <---  ready
    Ranks.run(function, x)
      opens a store for the ranks to meet --->  joins a gloo group, calls function(x)
      waits for every rank's outcome      <---  result, or the error with its traceback
    returns, or raises RanksError         --->  leaves the group, restores global state
                                          <---  ready

Lightning sees the environment that torchrun sets, so a Trainer or a Fabric in a rank launches no processes of its own.
Only this module knows of the workers; a test writes module-level functions and asks `dist.get_rank()` who it is.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import functools
import gc
import io
import logging
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from nursery import START_SECONDS, Child, Nursery

T = TypeVar("T")
_Function: TypeAlias = Callable[..., Any]

DEATH_SECONDS = 1.0  # what the other ranks have to report once one of them died
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
READY = "ready"  # a worker's message before each job
LEAVE = b"leave"  # the message to a worker after each job


class RanksError(RuntimeError):
    """At least one rank failed; the message holds the first failing rank's traceback and what became of the rest."""


@dataclass(frozen=True)
class _Result:
    value: Any  # what the function returned


@dataclass(frozen=True)
class _Failure:
    kind: str  # the exception's type name
    message: str
    traceback: str
    when: float  # time.monotonic(), which all processes of a machine share

    def __str__(self) -> str:
        return f"raised {self.kind}: {self.message}"


@dataclass(frozen=True)
class _Lost:
    """No answer came and none will."""

    why: str
    stuck: bool = False  # alive, where otherwise it has died

    def __str__(self) -> str:
        return self.why


_Outcome: TypeAlias = _Result | _Failure | _Lost


@dataclass(frozen=True)
class _Worker:
    process: Child
    connection: Connection


class Ranks:
    """`world_size` processes in one gloo group; they start with the first run and end with the `with` block.

    Args:
        world_size: The number of ranks.
        timeout: The seconds one run may take before its ranks count as stuck.
        grace: The seconds that the other ranks have to finish once one of them has failed.
    """

    def __init__(self, world_size: int, *, timeout: float = 240.0, grace: float = 30.0) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self.grace = grace
        self._workers: list[_Worker] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> list[T]:
        """Call `function(*args, **kwargs)` on every rank at the same time and return the results by rank.

        Tensors travel by value: they arrive on the CPU, and detached from their graph. Warnings and log records up to
        WARNING are ignored in a rank; a test of either says so itself (`logging.disable(logging.NOTSET)`).

        Raises:
            RanksError: A rank raised, died or got stuck; the next run starts new processes.
        """
        __tracebackhide__ = True
        outcomes = self._outcomes(function, args, kwargs)
        results = [outcome.value for outcome in outcomes if isinstance(outcome, _Result)]
        if len(results) < self.world_size:
            self.close()  # who knows what state an unexpected error has left behind
            raise RanksError(_report(function, outcomes))
        return results

    def run_expecting_error(self, function: _Function, /, *args: Any, **kwargs: Any) -> list[tuple[str, str] | None]:
        """Call `function` as `run` does and return each rank's (exception type name, message), None if it returned.

        A RanksError says that no rank raised, or that one died or got stuck.
        """
        __tracebackhide__ = True
        outcomes = self._outcomes(function, args, kwargs)
        if any(isinstance(outcome, _Lost) for outcome in outcomes):
            self.close()
            raise RanksError(_report(function, outcomes))
        errors = [(o.kind, o.message) if isinstance(o, _Failure) else None for o in outcomes]
        if not any(errors):
            raise RanksError(f"Expected {_name(function)} to raise on at least one rank, got a result from every rank.")
        return errors

    def close(self) -> None:
        """End the processes and what they started, as after a test that changed what the harness does not restore."""
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):  # it and its children have ended already
                os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
            worker.connection.close()
        self._workers = []

    def _outcomes(self, function: _Function, args: Any, kwargs: Any) -> list[_Outcome]:
        call = _pack_call(function, args, kwargs)
        try:
            self._make_ready()
            # A store for each run, as torchrun has: code under test that joins by the environment finds no old keys.
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            job = pickle.dumps((sys.path, store.port, call))
            for worker in self._workers:
                with contextlib.suppress(OSError):  # it has died; _receive will say so
                    for stream in (1, 2):  # a rank writes to where this process writes now: capfd sees its output
                        send_handle(worker.connection, stream, worker.process.pid)
                    worker.connection.send_bytes(job)
            outcomes = self._receive(self.timeout)
            for rank, (worker, outcome) in enumerate(zip(self._workers, outcomes, strict=True)):
                if isinstance(outcome, _Lost) and outcome.stuck:
                    print(f"rank {rank} of {self.world_size} is at:", file=sys.stderr, flush=True)
                    worker.process.send_signal(signal.SIGUSR1)  # its faulthandler writes its stack to stderr
                    time.sleep(0.2)
                with contextlib.suppress(OSError):
                    worker.connection.send_bytes(LEAVE)
        except BaseException:  # pytest-timeout and Ctrl-C included: no rank outlives the run it is busy with
            self.close()
            raise
        return outcomes

    def _make_ready(self) -> None:
        """Leave every worker waiting for a job: the ones of the last run if they are in order, else new ones."""
        if self._workers:
            if all(message == READY for message in self._receive(self.grace)):
                return
            self.close()
        self._start()
        answers = self._receive(START_SECONDS)
        if not all(answer == READY for answer in answers):
            raise RanksError(f"The ranks did not start (stderr says why): {_list(answers, range(self.world_size))}.")

    def _start(self) -> None:
        for rank, nursery in enumerate([_nursery(rank) for rank in range(self.world_size)]):
            connection, theirs = multiprocessing.Pipe()
            process = nursery.start(theirs.fileno(), _environment(rank, self.world_size))
            theirs.close()
            self._workers.append(_Worker(process, connection))

    def _receive(self, seconds: float) -> list[Any]:
        """One message from each worker, or `_Lost` for those that died or let the time run out."""
        messages: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while len(messages) < self.world_size and time.monotonic() < deadline:
            missing = {w.connection: rank for rank, w in enumerate(self._workers) if rank not in messages}
            heard = wait(list(missing), timeout=0.2)
            for connection, rank in missing.items():
                message = self._read(rank, connection in heard)
                if message is not None:
                    messages[rank] = message
                if isinstance(message, (_Failure, _Lost)):
                    patience = self.grace if isinstance(message, _Failure) else DEATH_SECONDS
                    deadline = min(deadline, time.monotonic() + patience)
        stuck = _Lost("did not finish in time and was killed", stuck=True)
        return [messages.get(rank, stuck) for rank in range(self.world_size)]

    def _read(self, rank: int, heard: bool) -> Any:
        """The message that has arrived from `rank`, None if there is none yet."""
        process, connection = self._workers[rank].process, self._workers[rank].connection
        code = process.poll()  # a dead worker's children may hold its end open: the connection does not tell all deaths
        try:
            if heard or (code is not None and connection.poll()):
                return pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            code = process.wait(timeout=5)
        if code is None:
            return None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return _Lost(f"{how} before it had finished")


@functools.cache
def _nursery(rank: int) -> Nursery:
    """The one of a rank, whatever the number of ranks; it ends with this process."""
    nursery = Nursery(_environment(rank, rank + 1))
    atexit.register(nursery.close)
    return nursery


def _environment(rank: int, world_size: int) -> dict[str, str]:
    """What torchrun sets for a worker (MASTER_PORT comes with each job), and what keeps it quiet and on one thread."""
    environment = {
        **os.environ,
        **dict.fromkeys(["RANK", "LOCAL_RANK"], str(rank)),
        **dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(world_size)),
        **dict.fromkeys(["GROUP_RANK", "NODE_RANK"], "0"),
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "harness",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # a rank that reads the environment joins our store, and hosts none
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",  # what a rank has printed is there even if it is killed
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name need not resolve
    return environment


def _name(function: _Function) -> str:
    return f"{function.__module__}.{function.__qualname__}" if hasattr(function, "__qualname__") else repr(function)


def _list(outcomes: list[Any], ranks: Iterable[int]) -> str:
    said = {rank: outcomes[rank] if isinstance(outcomes[rank], (_Failure, _Lost)) else "returned" for rank in ranks}
    return "; ".join(f"rank {rank} {what}" for rank, what in said.items())


def _order_of_blame(outcome: _Outcome) -> tuple[int, float]:
    """Deaths, then errors as they happened, then what was stuck: the later may well follow from the earlier."""
    if isinstance(outcome, _Lost):
        return (2 if outcome.stuck else 0), 0.0
    return (1, outcome.when) if isinstance(outcome, _Failure) else (3, 0.0)


def _report(function: _Function, outcomes: list[_Outcome]) -> str:
    """The first failure in full, and the other ranks in a line."""
    first, *others = sorted(range(len(outcomes)), key=lambda rank: _order_of_blame(outcomes[rank]))
    outcome = outcomes[first]
    parts = [f"In {_name(function)}, rank {first} of {len(outcomes)} {outcome}"]
    if isinstance(outcome, _Failure):
        parts.append(outcome.traceback)
    if others:
        parts.append(f"The other ranks: {_list(outcomes, others)}.")
    return "\n\n".join(parts)


class _Pickler(pickle.Pickler):
    """Sends a tensor as its own bytes; torch's way is a view's whole storage, and nothing that is inside a graph."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        is_parameter = isinstance(value, torch.nn.Parameter)
        return _tensor, (data, plain.dtype, plain.shape, is_parameter, value.is_leaf and value.requires_grad)


def _tensor(data: bytes, dtype: torch.dtype, shape: torch.Size, is_parameter: bool, grad: bool) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    return torch.nn.Parameter(tensor, requires_grad=grad) if is_parameter else tensor.requires_grad_(grad)


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def _pack_call(function: _Function, args: Any, kwargs: Any) -> bytes:
    try:
        return _dumps((function, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"Expected a module-level function and arguments that can be pickled, got {_name(function)} ({error}). "
            "Ranks import the function by name: move it to the top level of its test module."
        ) from error


def serve(descriptor: int) -> None:
    """Do the jobs that come through `descriptor`, one end of a connection, until the other end is closed."""
    connection = Connection(descriptor)
    faulthandler.register(signal.SIGUSR1)
    _rewrite_assertions()
    environment, folder = dict(os.environ), os.getcwd()
    while True:
        _restore(environment, folder)
        connection.send_bytes(_dumps(READY))
        try:
            for stream in (1, 2):
                os.dup2(handle := recv_handle(connection), stream)
                os.close(handle)
            outcome, failed = _perform(connection.recv_bytes())
            connection.send_bytes(outcome)
            if failed:
                _leave_group()  # breaks the connections of its peers, which may wait for it in a collective
            connection.recv_bytes()  # LEAVE: every rank is done, and none is still forming a group
            _leave_group()
        except (EOFError, BrokenPipeError):
            return


def _perform(job: bytes) -> tuple[bytes, bool]:
    """The pickled outcome, and whether it is a failure."""
    try:
        sys.path[:], port, call = pickle.loads(job)
        function, args, kwargs = pickle.loads(call)
        _join_group(port)
        with warnings.catch_warnings():  # what a job filters is its own affair
            return _dumps(_Result(function(*args, **kwargs))), False
    except BaseException as error:  # SystemExit and pytest.skip are outcomes, too
        report = "".join(traceback.format_exception(error)).rstrip()
        return _dumps(_Failure(type(error).__name__, str(error), report, time.monotonic())), True


def _join_group(port: int) -> None:
    """Form the default group, under keys that one formed by the environment (after leaving this one) does not use."""
    os.environ["MASTER_PORT"] = str(port)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.PrefixStore("harness", dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    if store.add("joined", 1) == world_size:
        store.set("all joined", "")
    store.wait(["all joined"])  # a rank that fails at once does not break the others' joining


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _restore(environment: dict[str, str], folder: str) -> None:
    """Undo what a run may have changed for its whole process, so that the order of tests makes no difference."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # for the loggers that Lightning sets to INFO when it is imported
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    gc.collect()
    gc.freeze()  # what is left are modules: the next collection need not look at all of Lightning again


def _rewrite_assertions() -> None:
    """Have a bare `assert` in a test module show its values, as it does in pytest's own process."""
    from _pytest.assertion import install_importhook
    from _pytest.config import get_config

    install_importhook(get_config())
