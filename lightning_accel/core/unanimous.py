"""What may fail on some ranks fails on all of them: none goes on to wait for one that does not come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lightning_accel.core.collectives import Collectives

T = TypeVar("T")


def on_all_ranks(do: Callable[[], T], collectives: Collectives) -> T:
    """Do something that may fail on some ranks only. All ranks call this together.

    Args:
        do: Must not wait for other ranks.
        collectives: The ranks.

    Returns:
        What it returns on this rank.

    Raises:
        Exception: What it has raised on this rank.
        ValueError: If it has failed on other ranks; the first of them and its error are named.

    """
    failure: Exception | None = None
    try:
        result = do()
    except Exception as error:
        failure = error
    told = collectives.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, why in enumerate(told):
        if why is not None:
            raise ValueError(f"rank {rank} has failed: {why}")
    return result
