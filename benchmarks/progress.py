"""A bar that says what is being measured, and how far the work is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on standard error; yields what tells it what the work is, how much is done, and of how much."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("")

        def report(what: str, done: int, pieces: int) -> None:
            bar.update(task, description=what, completed=done, total=pieces)

        yield report
        bar.update(task, description="measured", completed=bar.tasks[0].total)
