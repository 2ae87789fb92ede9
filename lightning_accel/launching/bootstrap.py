"""What each rank of ``accel launch`` runs: ``python -m lightning_accel.launching.bootstrap script|module TARGET ...``.

Importing this package has registered its strategies, so that a script that knows nothing of it can name one. Then the
script runs as if python had been given it: ``sys.argv``, ``sys.path``, ``__main__`` and tracebacks are the same. How it
fails is written down for the launcher, with the moment, by which that tells the first failure from those that follow.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import faulthandler
import io
import json
import os
import runpy
import signal
import sys
import time
import traceback
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType

from lightning_accel.launching import lightning_defaults
from lightning_accel.variables import LAUNCHER

_SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux."""
_OURS = {__file__, runpy.__file__, "<frozen runpy>"}


def main() -> None:
    """Run what the command line says."""
    kind, target, *arguments = sys.argv[1:]
    end_with(int(os.environ.pop(LAUNCHER, os.getppid())))
    lightning_defaults.offer()
    faulthandler.enable()  # what crashes in C++ shows where it was
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Under -u a line and its end are two writes, between which those of other ranks may come.
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
    sys.excepthook = _print
    try:
        (run_module if kind == "module" else run_script)(target, arguments)
    except SystemExit as error:
        if error.code not in (None, 0):
            _record(error)
        raise
    except BaseException as error:
        _record(error)
        raise


def end_with(launcher: int) -> None:
    """Have the kernel end this process when the one that has started it is gone, which then cannot do it itself.

    More exactly, when the thread is gone that has: that is the one that waits for the ranks. For Linux; elsewhere ranks
    of a launcher that was killed go on.

    Args:
        launcher: The number of that process.

    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != launcher and (os.getppid() == 1 or not _runs(launcher)):  # else this is under a wrapper
        os.kill(os.getpid(), signal.SIGKILL)  # the launcher went before


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def run_script(path: str, arguments: list[str]) -> None:
    """As ``python path arguments``."""
    sys.argv = [path, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # else python has put no folder there
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    # runpy.run_path takes the module away again when the script has ended, and what runs later (threads, atexit) would
    # not find its classes.
    absolute = os.path.abspath(path)
    module = ModuleType("__main__")
    loader = SourceFileLoader("__main__", absolute)
    module.__dict__.update(__file__=absolute, __cached__=None, __builtins__=builtins, __loader__=loader)
    sys.modules["__main__"] = module
    with io.open_code(absolute) as file:
        code = compile(file.read(), absolute, "exec", dont_inherit=True)
    exec(code, module.__dict__)


def run_module(name: str, arguments: list[str]) -> None:
    """As ``python -m name arguments``."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _print(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception that nobody has caught, without what is above the script."""
    shown = _of_script(trace)
    sys.__excepthook__(kind, error.with_traceback(shown), shown)


def _of_script(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename in _OURS:
        trace = trace.tb_next
    return trace


def _record(error: BaseException) -> None:
    """Write the failure where torchrun's agent looks for it, in its format."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    now = time.time()
    lines = traceback.format_exception(type(error), error, _of_script(error.__traceback__))
    what = {
        "message": "".join(traceback.format_exception_only(type(error), error)).strip(),
        "extraInfo": {"py_callstack": "".join(lines), "timestamp": str(int(now)), "when": now},
    }
    # As a whole or not at all: this process may be ended while it writes.
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump({"message": what}, file)
    os.replace(part, path)


if __name__ == "__main__":
    main()
