"""``accel inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lightning_accel.cli.console import console, readable_errors

if TYPE_CHECKING:
    from lightning_accel.convert import OptimizerSummary, Summary, TensorSummary


def inspect(
    path: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint of any format.", show_default=False)],
    weights_only: Annotated[
        bool,
        typer.Option(
            help="Refuse checkpoints with anything but tensors, numbers, strings and collections of them in it."
            " --no-weights-only runs what a checkpoint says: for those that you trust."
        ),
    ] = True,
) -> None:
    """Print what is in a checkpoint: names, shapes, dtypes, who wrote it, at which step, and its size.

    CKPT may be anything that `accel convert` reads. No values are read.
    """
    from lightning_accel.convert import inspect as look

    with readable_errors():
        summary = look(path, weights_only=weights_only)
    out = console()
    out.print(_overview(summary))
    out.print(_model(summary))
    for optimizer in summary.optimizers:
        out.print(_optimizer(optimizer))


def _overview(summary: Summary) -> Table:
    from lightning_accel.convert.sizes import format_size

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "path": str(summary.path),
        "format": summary.format,
        "written by": summary.writer,
        "ranks": summary.world_size,
        "epoch": summary.epoch,
        "step": summary.step,
        "size": f"{format_size(summary.disk_bytes)} on disk, {format_size(summary.tensor_bytes)} of tensors",
        "other entries": ", ".join(summary.others),
        "not converted": "\n".join(summary.left_out),
    }
    for name, value in rows.items():
        if value not in (None, ""):
            table.add_row(name, Text(str(value)))
    return table


def _titled(title: str, table: Table) -> Group:
    """A table under a line of its own: as the table's title it would be folded to the table's width."""
    return Group(Text(title, style="italic"), table)


def _model(summary: Summary) -> Group:
    from lightning_accel.convert.sizes import format_size

    elements = sum(entry.numel for entry in summary.tensors)
    table = Table()
    table.add_column("name", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column("dtype", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for entry in summary.tensors:
        table.add_row(Text(entry.name), _shape(entry), _dtype(entry), format_size(entry.nbytes))
    return _titled(f"Model: {len(summary.tensors)} tensors, {elements:,} elements", table)


def _optimizer(optimizer: OptimizerSummary) -> Group:
    kind = "by name" if optimizer.by_name else "by number"
    title = f"Optimizer {optimizer.name}: {optimizer.groups} groups, {optimizer.parameters} parameters {kind}"
    table = Table()
    table.add_column("parameter", overflow="fold")
    table.add_column("state", overflow="fold")
    for parameter, entries in optimizer.states.items():
        state = ", ".join(f"{entry.name} {_dtype(entry)} {_shape(entry).plain}" for entry in entries)
        table.add_row(Text(parameter), Text(state))
    return _titled(title, table)


def _shape(entry: TensorSummary) -> Text:
    return Text(str(list(entry.shape)))


def _dtype(entry: TensorSummary) -> str:
    return str(entry.dtype).removeprefix("torch.")
