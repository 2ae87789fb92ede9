"""The files of a benchmark that has a table of its own: a page with the machine and the command, and all rounds."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import describe


def add_out(parser: argparse.ArgumentParser) -> None:
    """Give a command line the option that says where files go."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="a folder for the table and all rounds, as files")


def write(out: Path, name: str, text: str, rounds: Mapping[str, Any], header: Mapping[str, Any] | None = None) -> None:
    """Write ``<name>.md`` and ``<name>.jsonl``.

    Args:
        out: The folder; it is made.
        name: Of the module in ``benchmarks``.
        text: The table, as printed.
        rounds: By what was measured, its figures of all rounds, and what else is to be kept.
        header: What ``describe`` has said before the rounds. Default: what it says now.
    """
    header = header or describe(f"benchmarks.{name}")
    machine, versions = header["machine"], header["versions"]
    told = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    situation = f"{header['date']}; {machine['processor']}, {machine['cores']} cores; {told}."
    page = [f"# {name}", "", situation, "", *("    " + line if line else "" for line in text.rstrip().splitlines())]
    lines = [{"kind": "run", **header}, *({"kind": "rounds", "name": key, "rounds": it} for key, it in rounds.items())]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join([*page, "", f"- `{header['command']}`"]) + "\n")
    (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
