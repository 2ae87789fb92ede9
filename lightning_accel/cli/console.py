"""What commands print, and how they fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

_WIDE = 10_000
"""Columns where there is no terminal: what is piped elsewhere is neither cut nor folded."""


def console(*, stderr: bool = False) -> Console:
    """Where to print."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else _WIDE, highlight=False)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print what went wrong, without a traceback, and exit with 1: for errors that the user can do something about."""
    try:
        yield
    except (ValueError, OSError) as error:
        console(stderr=True).print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(1) from error
