"""``accel convert``."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from lightning_accel.cli.console import console, readable_errors


class Target(str, Enum):
    """What can be written."""

    ckpt = "ckpt"
    sharded = "sharded"
    safetensors = "safetensors"


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="What to read.", show_default=False)],
    dst: Annotated[
        Path,
        typer.Argument(
            metavar="DST", help="Where to write: it is there as a whole, or not at all.", show_default=False
        ),
    ],
    to: Annotated[
        Target | None,
        typer.Option(
            help="ckpt: one file, which stock Lightning loads. sharded: a directory of this package. safetensors: the"
            " model alone, as a file or, if the name does not end in .safetensors, as a Hugging Face folder."
            " By default what the suffix of DST says.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            help="Size of a file in a safetensors folder at most, such as 500MB. Default: 5GB.", show_default=False
        ),
    ] = None,
    prefix: Annotated[
        str,
        typer.Option(
            help="Only what of the model begins with this, and without it: 'model.' for what a LightningModule keeps"
            " in self.model.",
            show_default=False,
        ),
    ] = "",
    weights_only: Annotated[
        bool,
        typer.Option(
            help="Refuse sources with anything but tensors, numbers, strings and collections of them in it."
            " --no-weights-only runs what a source says: for those that you trust."
        ),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is at DST.")] = False,
) -> None:
    """Write a checkpoint in another format.

    SRC may be

    - a checkpoint directory of lightning-accel, of Lightning's FSDPStrategy or ModelParallelStrategy, or of
      torch.distributed.checkpoint,
    - a DeepSpeed directory: ZeRO stages 0 to 3, or universal,
    - a .ckpt or another file of torch.save,
    - safetensors: one file, or a folder with an index.

    Values stay what they are, bit by bit, and memory holds one tensor at a time.

    For example:

    - `accel convert deepspeed_dir last.ckpt`
    - `accel convert last.ckpt model.safetensors`
    - `accel convert last.ckpt folder --to safetensors --max-shard-size 2GB --prefix model.`
    """
    from lightning_accel.convert import convert as run
    from lightning_accel.convert.sizes import format_size

    out = console()
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    progress = Progress(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task = progress.add_task(f"Writing {dst}", total=None)
    with readable_errors(), progress:
        result = run(
            src,
            dst,
            to=None if to is None else to.value,
            max_shard_size=max_shard_size,
            prefix=prefix,
            weights_only=weights_only,
            overwrite=overwrite,
            begin=lambda total: progress.update(task, total=total),
            done=lambda nbytes: progress.advance(task, nbytes),
        )
    out.print(
        f"{src} ({result.source}) -> {dst} ({result.target}): {result.tensors} tensors, {format_size(result.nbytes)}",
        markup=False,
    )
    for message in result.left_out:
        out.print(f"Left out: {message}", markup=False)
