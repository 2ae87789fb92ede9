"""When one rank fails, the others must end soon and say where to look."""

from __future__ import annotations

import atexit
import subprocess
from collections.abc import Sequence

_PEER_IS_GONE = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket closed")


def explain(exception: BaseException) -> None:
    """Say so in an exception's message if it is but the echo of another rank's failure."""
    text = str(exception).lower()
    if isinstance(exception, RuntimeError) and any(sign in text for sign in _PEER_IS_GONE):
        note = "Another rank has ended: its own traceback, printed earlier, shows the cause. This rank stops, too."
        exception.args = (f"{exception.args[0] if exception.args else ''}\n{note}", *exception.args[1:])


def end_children_at_exit(children: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Have child processes that do not end by themselves within ``grace_s`` after this one failed be ended."""

    def end() -> None:
        for child in children:
            try:
                child.wait(grace_s)
            except subprocess.TimeoutExpired:
                child.kill()

    atexit.register(end)
