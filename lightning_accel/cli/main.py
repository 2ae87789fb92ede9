"""The ``accel`` command."""

from __future__ import annotations

import typer

from lightning_accel.cli.convert import convert
from lightning_accel.cli.inspect import inspect
from lightning_accel.cli.plan import plan

app = typer.Typer(
    name="accel",
    help="Tools of lightning-accel, distributed training for PyTorch Lightning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def _has_subcommands() -> None:
    """With a callback, typer asks for a subcommand even if there is one only."""


app.command()(convert)
app.command()(inspect)
app.command()(plan)


def main() -> None:
    """Run what the command line says. Exits with 1 if it fails, and with 2 if the command line is wrong."""
    app()
