"""Whether all of a checkpoint fits is found out before any of it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from lightning_accel.strategies.unanimous import unanimous

T = TypeVar("T")


def prepare_all(firsts: Iterable[Callable[[], T]]) -> list[T]:
    """Do the first halves of loading several things, which change nothing. All ranks take part.

    Args:
        firsts: Each returns its second half, which loads, or raises if something does not fit.

    Returns:
        The second halves, in the same order.

    Raises:
        Exception: On all ranks, if something does not fit: what it says itself; a ValueError or RuntimeError that lists
            all if there are several.

    """
    ready: list[T] = []
    failures: list[Exception] = []
    for first in firsts:
        try:
            ready.append(first())
        except Exception as error:
            failures.append(error)

    def require_none() -> None:
        if len(failures) > 1:
            kind = ValueError if all(isinstance(failure, ValueError) for failure in failures) else RuntimeError
            raise kind("\n".join(map(str, failures)))
        if failures:
            raise failures[0]

    unanimous("loading a checkpoint", require_none)
    return ready
