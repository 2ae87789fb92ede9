"""Which rank is to blame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from lightning_accel.launching.failure import first_failure

NOW = 1_000.0


def failure(folder: Path, exit_code: int, when: float, error: str | None = None) -> ProcessFailure:
    """As the agent has it: the moment with its fraction if the rank wrote a file, else the agent's whole seconds."""
    path = folder / f"{exit_code}.{when}.json"
    if error is not None:
        extra: dict[str, Any] = {"py_callstack": f"Traceback: {error}", "timestamp": str(int(when)), "when": when}
        path.write_text(json.dumps({"message": {"message": error, "extraInfo": extra}}))
    found = ProcessFailure(local_rank=0, pid=1, exitcode=exit_code, error_file=str(path))
    if error is None:
        found.timestamp = int(when)
    return found


@pytest.mark.parametrize(
    ("failures", "rank", "code", "what"),
    [
        # The peer's connection is gone some milliseconds after.
        ({0: (1, NOW + 0.02, "RuntimeError: closed"), 1: (1, NOW, "KeyError: 'x'")}, 1, 1, "KeyError: 'x'"),
        # The agent sees the death later than the other rank saw it.
        ({0: (1, NOW + 0.02, "RuntimeError: closed"), 1: (-9, NOW + 1.0, None)}, 1, 137, "it was killed by SIGKILL"),
        # The agent has ended what would not end.
        ({0: (-9, NOW + 30.0, None), 1: (1, NOW, "KeyError: 'x'")}, 1, 1, "KeyError: 'x'"),
        ({0: (-15, NOW, None), 1: (3, NOW + 0.9, None)}, 1, 3, "it exited with code 3, without an exception"),
        ({0: (-15, NOW, None), 1: (4, NOW, "SystemExit: 4")}, 1, 4, "it exited with code 4"),
    ],
)
def test_the_first(
    tmp_path: Path, failures: dict[int, tuple[int, float, str | None]], rank: int, code: int, what: str
) -> None:
    found = first_failure({number: failure(tmp_path, *given) for number, given in failures.items()})
    assert (found.rank, found.exit_code, found.what) == (rank, code, what)
    assert found.headline() == f"Rank {rank} failed (1 more on this machine followed): {what}"
    assert found.traceback == (f"Traceback: {what}" if "KeyError" in what else "")
