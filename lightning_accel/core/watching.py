"""The phases of a step, by name, and what is told of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

FORWARD = "forward"
BACKWARD = "backward"
GRADIENTS = "gradients"
"""Reduced gradients are waited for: communication that backward does not hide."""
PARAMETERS = "parameters"
"""Parameters that are gathered are waited for; where they rest sharded, also the other ranks before an update."""
UPDATE = "update"
"""The optimizer's step."""


class Watcher:
    """Is told of an engine's phases; does nothing with it."""

    def within(self, phase: str) -> AbstractContextManager[Any]:
        """Around what belongs to a phase."""
        return nullcontext()

    def begin_update(self) -> None:
        """Before an optimizer updates parameters."""
        return

    def end_step(self) -> None:
        """After an optimizer step."""
        return

    def close(self) -> None:
        """The engine is closed: nothing more will be told."""
        return
