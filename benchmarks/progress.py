"""A bar that says what is being measured, and how far the work is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LINE_EVERY_S = 60.0
"""Where there is no terminal to draw a bar on, a line says so each minute."""


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on standard error; yields what tells it what the work is, how much is done, and of how much."""
    console = Console(stderr=True)
    said = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("")

        def report(what: str, done: int, pieces: int) -> None:
            nonlocal said
            bar.update(task, description=what, completed=done, total=pieces)
            if not console.is_terminal and time.monotonic() - said > _LINE_EVERY_S:
                said = time.monotonic()
                console.print(f"{done} of {pieces} done; now {what}", highlight=False)

        yield report
        bar.update(task, description="measured", completed=bar.tasks[0].total)
