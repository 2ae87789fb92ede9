"""``accel bench``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from lightning_accel.cli.console import readable_errors


def bench(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGUMENTS", help="What python -m benchmarks takes.", show_default=False),
    ] = None,
) -> None:
    """Measure the strategies beside torch's and others on this machine: the benchmarks of the repository.

    They are not part of the installed package. Run it in a checkout, or with a package that was installed from one by
    `pip install --editable`.

    For example:

    - `accel bench --quick`

    - `accel bench -- --help` says what can be measured
    """
    with readable_errors():
        root = _checkout()
        command = [sys.executable, "-m", "benchmarks", *(arguments or [])]
        search = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
        variables = {**os.environ, "PYTHONPATH": search}
        if os.name == "posix":  # in place of this process, so that signals reach them and none is left behind
            os.execve(sys.executable, command, variables)
        raise typer.Exit(subprocess.run(command, env=variables, check=False).returncode)


def _checkout() -> Path:
    import lightning_accel

    places = [Path.cwd(), Path(lightning_accel.__file__).resolve().parent.parent]
    for place in places:
        if (place / "benchmarks" / "__main__.py").is_file() and (place / "lightning_accel").is_dir():
            return place
    raise ValueError(
        f"Expected the benchmarks, which the repository has and the installed package has not, in {places[0]} or beside"
        f" {places[1]}/lightning_accel. Run this command in a checkout of lightning-accel; the benchmarks need the"
        " extra bench: pip install 'lightning-accel[bench]'."
    )
