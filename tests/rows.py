"""Which rows a test runs for every day."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

CHOSEN = ("zero2", "fsdp")
"""One in which parameters rest replicated, and one in which nothing does. (``ddp`` has tests of its own besides.)"""


def everyday(rows: Sequence[Any]) -> list[Any]:
    """Parameters for all rows; those beyond the chosen ones run with the matrix only.

    For tests of what works in the same way on all rows of a kind. A row is a name, or a tuple of names.
    """
    names = {*CHOSEN, "auto"}
    return [
        row if names.issuperset([row] if isinstance(row, str) else row) else pytest.param(*_tuple(row), marks=_MATRIX)
        for row in rows
    ]


_MATRIX = pytest.mark.matrix


def _tuple(row: Any) -> tuple[Any, ...]:
    return (row,) if isinstance(row, str) else row
