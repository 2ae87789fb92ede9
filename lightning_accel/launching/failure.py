"""Which rank failed first, and how."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_NOTICED_S = 1.5
"""How late the agent may be to see that a rank was killed: it looks a few times a second, and notes whole seconds."""


@dataclass(frozen=True)
class Failure:
    """One rank's."""

    rank: int
    """Among all machines'."""
    ranks: int
    """How many ranks this machine has that failed: those that follow the first included."""
    exit_code: int
    """What a shell would say: 128 and its number for a signal."""
    what: str
    """One line."""
    traceback: str
    """Empty if it left none."""

    def headline(self) -> str:
        """One line about it."""
        others = f" ({self.ranks - 1} more on this machine followed)" if self.ranks > 1 else ""
        return f"Rank {self.rank} failed{others}: {self.what}"


def first_failure(failures: Mapping[int, ProcessFailure]) -> Failure:
    """The one that the others follow from, of a machine's.

    A rank that fails has the others fail within milliseconds, as their peer is gone, or the agent ends them.

    Args:
        failures: What the agent has seen, by rank.

    """
    rank = min(failures, key=lambda number: _order(failures[number]))
    failure = failures[rank]
    found = failure.error_file_data.get("message")
    if isinstance(found, dict):
        what, trace = str(found["message"]).partition("\n")[0], str(found["extraInfo"].get("py_callstack", ""))
        if what.startswith("SystemExit"):
            what, trace = f"it exited with code {failure.exitcode}", ""
    elif failure.exitcode < 0:
        what, trace = f"it was killed by {failure.signal_name()}", ""
    else:
        what, trace = f"it exited with code {failure.exitcode}, without an exception", ""
    code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    if trace:
        code = 1  # as Python exits after an exception, also if the agent was quicker to end it
    return Failure(rank, len(failures), code, what, trace)


def _order(failure: ProcessFailure) -> tuple[bool, float]:
    """Those that the agent has ended last, the others by when they failed."""
    found = failure.error_file_data.get("message")
    if isinstance(found, dict) and "when" in found["extraInfo"]:
        return False, float(found["extraInfo"]["when"])
    ended = failure.exitcode == -signal.SIGTERM
    return ended, failure.timestamp - _NOTICED_S
