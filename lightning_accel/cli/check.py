"""``accel test``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lightning_accel.cli.console import console, readable_errors
from lightning_accel.cli.launch import run

_CLOSE = 1e-9
"""In double precision; sums that are taken in another order differ by 1e-15."""


def check(
    num_processes: Annotated[int, typer.Option("--num_processes", min=2, help="How many ranks.")] = 2,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="On the CPU, although there are GPUs.", show_default=False)
    ] = False,
) -> None:
    """Train a small model on this machine as `accel launch` would, and compare it with a single process.

    Under accel_ddp, accel_zero2 and accel_fsdp, in double precision, on two ranks: on GPUs if there are enough, else on
    the CPU. Exits with 1 if losses differ or a rank fails. It takes less than a minute.
    """
    with readable_errors():
        import torch
        from lightning.fabric import Fabric

        from lightning_accel.launching.check import train
        from lightning_accel.launching.settings import LaunchSettings

        on_cpu = cpu or torch.cuda.device_count() < num_processes
        accelerator = "cpu" if on_cpu else "cuda"
        alone = Fabric(accelerator=accelerator, devices=1)
        expected = train(alone, alone.device, num_processes, 0)
        with tempfile.TemporaryDirectory(prefix="accel_test_") as folder:
            path = Path(folder) / "losses.json"
            settings = LaunchSettings(num_processes=num_processes, cpu=on_cpu)
            run(settings, "lightning_accel.launching.check", [str(path), accelerator], module=True)
            found = json.loads(path.read_text())
    table = Table(title=f"{found['ranks']} ranks on {found['device']}, beside a single process", title_justify="left")
    for name in ("strategy", "first loss", "last loss", "largest difference", ""):
        table.add_column(name)
    table.add_row("single process", f"{expected[0]:.6f}", f"{expected[-1]:.6f}", "", "")
    passed = found["ranks"] == num_processes
    for row, losses in found["losses"].items():
        differences = [abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True)]
        same = all(difference <= _CLOSE for difference in differences)  # max() would pass over a NaN
        passed = passed and same
        shown = f"{losses[0]:.6f}", f"{losses[-1]:.6f}", f"{max(differences):.1e}"
        table.add_row(f"accel_{row}", *shown, "ok" if same else "WRONG")
    console().print(table)
    if not passed:
        raise typer.Exit(1)
