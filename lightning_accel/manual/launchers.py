"""Ranks of this machine, started from within a program: a notebook's, or a test's."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.multiprocessing import start_processes
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from lightning_accel.core.registry import await_peers
from lightning_accel.variables import CPU

StartMethod = Literal["fork", "spawn", "forkserver"]

_LOCAL = "127.0.0.1"


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    *,
    num_nodes: int = 1,
    node_rank: int = 0,
    master_addr: str = _LOCAL,
    use_port: int | str | None = None,
    start_method: StartMethod = "fork",
) -> Any:
    """Call a function on several ranks of this machine, from a notebook or any other program. Returns when all did.

    Each rank is a process with the environment that torchrun sets: ``Accelerator()``, ``Fabric`` and ``Trainer`` that
    the function makes find it there.

    Args:
        function: What each rank calls.
        args: Its arguments.
        num_processes: How many ranks this machine has; by default one for each CUDA device, or one.
        num_nodes: How many machines there are. The same is called on each of them.
        node_rank: Which of them this is.
        master_addr: The address of the first.
        use_port: A port that is free there; by default any. With several machines it must be given.
        start_method: How processes are started. ``"fork"`` is what notebooks need, whose functions no other process can
            import; there must not have been any use of CUDA before.

    Returns:
        What the function returned, if there is one rank only: that is called in this process.

    Raises:
        RuntimeError: If a rank failed, with the traceback of the first that did; the others are ended. Or if CUDA is in
            use already and ranks are to be forked.
        ValueError: If the numbers do not fit.

    """
    if num_processes is None:
        num_processes = max(1, torch.cuda.device_count())
    if num_processes < 1 or not 0 <= node_rank < num_nodes:
        raise ValueError(
            f"Expected at least one process and a node_rank below num_nodes, got num_processes={num_processes},"
            f" node_rank={node_rank}, num_nodes={num_nodes}."
        )
    if num_nodes > 1 and use_port is None:
        raise ValueError("Expected use_port, the same on all machines, for num_nodes > 1, got None.")
    if num_processes == num_nodes == 1:
        return function(*args)
    if start_method == "fork" and torch.cuda.is_initialized():
        raise RuntimeError(
            "Expected CUDA not to be in use before ranks are forked, but it is. Restart the notebook, and have nothing"
            " but the function touch a device."
        )
    port = free_port() if use_port is None else int(use_port)
    ranks = num_processes * num_nodes
    shared = {
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "GROUP_RANK": str(node_rank),
        "NODE_RANK": str(node_rank),
        "GROUP_WORLD_SIZE": str(num_nodes),
        "TORCHELASTIC_RUN_ID": "accel",  # by which Lightning knows that somebody has started the ranks
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 hosts the store
    }
    _run(function, tuple(args), num_processes, node_rank * num_processes, shared, start_method)
    return None


def debug_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int = 2,
    *,
    start_method: StartMethod = "fork",
) -> None:
    """Call a function on several ranks of this machine that use the CPU only: for tests and debugging.

    Args:
        function: What each rank calls.
        args: Its arguments.
        num_processes: How many ranks.
        start_method: How processes are started.

    Raises:
        RuntimeError: If a rank failed, with the traceback of the first that did; the others are ended.
        ValueError: If there is to be no rank.

    """
    if num_processes < 1:
        raise ValueError(f"Expected at least one process, got num_processes={num_processes}.")
    shared = {
        "MASTER_ADDR": _LOCAL,
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "GROUP_RANK": "0",
        "NODE_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "accel",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "CUDA_VISIBLE_DEVICES": "",
        CPU: "1",  # forked processes may have looked for CUDA devices already
    }
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name need not resolve
    _run(function, tuple(args), num_processes, 0, shared, start_method)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((_LOCAL, 0))
        port: int = listener.getsockname()[1]
    return port


def _run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    processes: int,
    first_rank: int,
    shared: dict[str, str],
    start_method: StartMethod,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        job = (function, args, first_rank, shared, folder)
        try:
            with _environment(shared):  # processes that are spawned import this package before they set it themselves
                start_processes(_work, job, nprocs=processes, join=True, start_method=start_method)
        except ProcessException as error:
            raise RuntimeError(_report(error, Path(folder), first_rank, int(shared["WORLD_SIZE"]))) from None


def _work(local_rank: int, function: Any, args: Any, first_rank: int, shared: dict[str, str], folder: str) -> None:
    """What each process does."""
    rank = first_rank + local_rank
    os.environ.update(shared)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(shared["LOCAL_WORLD_SIZE"])))
    try:
        function(*args)
        await_peers()  # they may still read this rank's part of the parameters
    except Exception:
        when = time.monotonic()
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps((when, traceback.format_exc())))
        raise
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            with contextlib.suppress(Exception):
                torch.distributed.destroy_process_group()


def _report(error: ProcessException, folder: Path, first_rank: int, ranks: int) -> str:
    """What went wrong first. That one rank ends may be why others fail, so the earliest counts."""
    failures = {int(path.stem): pickle.loads(path.read_bytes()) for path in folder.glob("*.pickle")}
    if failures and not isinstance(error, ProcessExitedException):
        rank = min(failures, key=lambda failed: failures[failed][0])
        return f"rank {rank} of {ranks} has failed:\n\n{failures[rank][1]}"
    rank = first_rank + error.error_index
    code = getattr(error, "exit_code", None)
    how = f"exit code {code}"
    if code is not None and code < 0:
        how = signal.Signals(-code).name
    return f"rank {rank} of {ranks} has ended with {how}, without a Python exception."


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
