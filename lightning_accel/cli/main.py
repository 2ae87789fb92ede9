"""The ``accel`` command."""

from __future__ import annotations

import typer

from lightning_accel.cli.bench import bench
from lightning_accel.cli.check import check
from lightning_accel.cli.config import config
from lightning_accel.cli.convert import convert
from lightning_accel.cli.env import env
from lightning_accel.cli.inspect import inspect
from lightning_accel.cli.launch import EITHER_SPELLING, launch
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


# What follows the script is the script's.
app.command(context_settings={**EITHER_SPELLING, "allow_interspersed_args": False})(launch)
app.command(context_settings=EITHER_SPELLING)(config)
app.command(context_settings=EITHER_SPELLING)(env)
app.command("test", context_settings=EITHER_SPELLING)(check)
app.command()(plan)
app.command()(convert)
app.command()(inspect)
# It hands on what it does not know.
app.command(context_settings={"ignore_unknown_options": True})(bench)


def main() -> None:
    """Run what the command line says. Exits with 1 if it fails, and with 2 if the command line is wrong."""
    app()
