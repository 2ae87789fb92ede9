"""What a reader has to know to compare a result with another: the machine, the versions, the time, the command."""

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("torch", "torch_xla", "lightning", "accelerate", "deepspeed", "lightning-accel")


def describe(command: str = "benchmarks") -> dict[str, Any]:
    """Machine, versions, date (UTC) and command line of this process, which is ``python -m command``.

    Where results go is left out of the command: it says nothing about them.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", command, *_telling(sys.argv[1:])]),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "system": platform.platform(),
            "load_before": load(),
        },
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


def _telling(arguments: Sequence[str]) -> list[str]:
    kept = [one for one in arguments if not one.startswith("--out=")]
    while "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return kept


def load() -> float:
    """How many processes of the machine wanted a core, on average over the last minute."""
    return os.getloadavg()[0]


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
