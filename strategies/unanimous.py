"""`lightning_accel.core.unanimous` for all processes that Lightning has started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_accel.core import unanimous as core

T = TypeVar("T")


def unanimous(doing: str, action: Callable[[], T]) -> T:
    """Do something on each rank, if it succeeds on all of them. All ranks call this together.

    Args:
        doing: What it is, for messages.
        action: Must not wait for other ranks.

    Returns:
        What the action returns on this rank.

    Raises:
        Exception: As in the core.

    """
    return core.unanimous(doing, action, _gather)


def _gather(value: Any) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
