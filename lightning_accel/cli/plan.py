"""``accel plan``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_accel.cli.console import console, readable_errors


def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="package.module:name or file.py:name of a callable without arguments that makes a model, or (model,"
            " batch); or hf:PATH, the config.json of a Hugging Face model or the folder that it is in.",
            show_default=False,
        ),
    ],
    ranks: Annotated[int, typer.Option(help="How many.")] = 8,
    memory: Annotated[
        str | None, typer.Option(help="What a rank has, such as 80GB (decimal).", show_default=False)
    ] = None,
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed, 16-mixed, bf16-true, 16-true or 64-true.")] = (
        "bf16-mixed"
    ),
    batch: Annotated[
        str | None,
        typer.Option(
            help="What a rank gets in a step, if TARGET does not say: the shape of a tensor, such as 32x3x224x224, or"
            " 4x2048:int64 with its dtype. hf: sequences x tokens; by default one, as long as the model takes, but"
            " 2048 at most.",
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="package.module:name of what makes the optimizer of the parameters, or a class of torch.optim. By"
            " default the LightningModule's own, or AdamW.",
            show_default=False,
        ),
    ] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="Only this row, such as zero2; may be given several times.")
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(help="How many ranks divide a copy under fsdp_hybrid. Default: 8.", show_default=False),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            help="Only with, or only without activation checkpointing. Default: both.",
            show_default=False,
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw it here.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data instead of a table.")] = False,
) -> None:
    """Say what a training step of a model would allocate and send on each rank, under every strategy.

    Nothing is allocated: the engine runs on tensors without memory, among ranks that are not there. Exits with 1 if no
    strategy fits the memory.

    For example:

    - `accel plan package.module:make_model --ranks 16 --memory 24GB --batch 8x1024:int64`
    - `accel plan hf:Llama-2-7b/config.json --ranks 8 --memory 80GB --png plan.png`
    """
    from lightning_accel.planning import plan as make
    from lightning_accel.planning.plan import ROWS
    from lightning_accel.planning.target import find_optimizer, find_target

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Without a thread that draws it: rows are simulated by forks of this process.
    shown = sys.stderr.isatty()
    bar = Progress(*columns, console=console(stderr=True), transient=True, disable=not shown, auto_refresh=False)
    task = bar.add_task(target, total=None)

    def show(name: str, done: int, total: int) -> None:
        bar.update(task, description=name, completed=done, total=total, refresh=True)

    with readable_errors(), bar:
        model, given = find_target(target, batch)
        planned = make(
            model,
            batch=given,
            optimizer=find_optimizer(optimizer, model),
            precision=precision,
            ranks=ranks,
            shard_size=shard_size,
            memory=memory,
            rows=row or ROWS,
            checkpointing=checkpointing,
            progress=show,
            processes=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        )
        if png is not None:
            planned.draw(png)
    out = console()
    if as_json:
        out.print_json(json.dumps(planned.to_dict()))
    else:
        out.print(planned.table())
    if planned.best is None:
        raise typer.Exit(1)
