"""What fails on one rank fails on all: none may go on, or wait for one that does not come."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def unanimous(doing: str, action: Callable[[], T], gather: Callable[[Any], list[Any]]) -> T:
    """Do something on each rank, if it succeeds on all of them. All ranks call this together.

    Args:
        doing: What it is, for messages.
        action: Must not wait for other ranks.
        gather: Sends an object to all ranks, and returns those of all, by rank.

    Returns:
        What the action returns on this rank.

    Raises:
        Exception: What the action has raised on this rank, or else one of the same kind (a RuntimeError, if it is not
            one of Python's own) that says which rank has failed, and why.

    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    told = gather(None if failure is None else (type(failure).__name__, str(failure)))
    if failure is not None:
        raise failure
    for rank, answer in enumerate(told):
        if answer is not None:
            kind = getattr(builtins, answer[0], RuntimeError)
            raise kind(f"rank {rank} has failed in {doing}: {answer[1]}")
    return result
