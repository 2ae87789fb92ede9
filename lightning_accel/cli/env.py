"""``accel env``."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lightning_accel.cli.console import console

_PACKAGES = (
    *("lightning-accel", "torch", "lightning", "pytorch-lightning", "torchmetrics", "torchdata", "torchao"),
    *("torch_xla", "deepspeed", "accelerate", "transformers", "safetensors", "fsspec", "numpy"),
)
_VARIABLES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("LT_ACCELERATOR", "LT_STRATEGY", "LT_DEVICES", "LT_NUM_NODES", "LT_PRECISION"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
}
_PREFIXES = ("PL_TRAINER_", "ACCEL_", "NCCL_", "GLOO_", "TORCHELASTIC_")
"""Of variables that are for nothing but training; with any other, what somebody else's begins with would be shown."""
_GIB = 2**30


def env(
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config_file", help="Settings to show. Default: those that accel launch reads.", show_default=False
        ),
    ] = None,
) -> None:
    """Print what a report of a problem should say: versions, devices, cores, memory, and the settings in use.

    Of environment variables those are printed that are for ranks: torch's, its back ends', Lightning's, this package's.
    Exits with 1 if the settings cannot be read, and says why in their place.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {**_versions(), **_machine(), **_variables()}
    try:
        rows |= _settings(config_file)
        bad = False
    except (ValueError, OSError) as error:
        rows["settings"] = f"Error: {error}"
        bad = True
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    console().print(table)
    if bad:
        raise typer.Exit(1)


def _versions() -> dict[str, str]:
    rows = {"python": f"{platform.python_version()} ({sys.executable})", "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            rows[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package == "lightning-accel":  # run from a checkout
                import lightning_accel

                rows[package] = f"{lightning_accel.__version__} (not installed)"
    return rows


def _machine() -> dict[str, str]:
    import torch

    from lightning_accel.launching.environment import cores

    rows = {"cores": f"{cores()} of {os.cpu_count()}"}
    if hasattr(os, "sysconf"):
        rows["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / _GIB:.1f} GiB"
    rows["torch built for"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    names = ("gloo", "nccl", "mpi")
    rows["back ends"] = ", ".join(name for name in names if getattr(torch.distributed, f"is_{name}_available")())
    rows["GPUs"] = str(torch.cuda.device_count())
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        rows[f"GPU {number}"] = f"{found.name}, {found.total_memory / _GIB:.1f} GiB, sm_{found.major}{found.minor}"
    return rows


def _variables() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if _is_shown(name)}


def _is_shown(name: str) -> bool:
    return name in _VARIABLES or name.startswith(_PREFIXES)


def _settings(config_file: Path | None) -> dict[str, str]:
    from lightning_accel.launching.settings_file import default_path, read

    found = read(config_file)
    rows = {"settings": str(found.path or f"the defaults; there is no {default_path()}")}
    rows |= {f"  {name}": str(value) for name, value in found.settings.changed().items()}
    if found.left_out:
        rows["  not taken over"] = "\n".join(found.left_out)
    return rows
