"""Which prepared loader a loop is in."""

from __future__ import annotations

from typing import Any, Protocol


class Loader(Protocol):
    """What is asked of a prepared loader while it is iterated."""

    end_of_dataloader: bool
    """Whether its last batch was handed out, and its iteration has not ended yet."""
    remainder: int
    """How many samples of the last batch, of all ranks together, are real; -1 if all are, or nobody knows."""
    joining: Any
    """Not None where ranks may have different numbers of batches."""

    @property
    def is_shadow(self) -> bool:
        """Whether the batch stands in for one that is not there, and counts nothing."""


class LoaderWatch:
    """The loaders whose iteration is under way, the innermost last: loaders tell when theirs begins and ends."""

    def __init__(self) -> None:
        self._stack: list[Loader] = []

    def began(self, loader: Any) -> None:
        """Called by a loader when an iteration begins."""
        self._remove(loader)  # one that was given up without an end
        self._stack.append(loader)

    def ended(self, loader: Any) -> None:
        """Called by a loader when its iteration has ended, or was given up."""
        self._remove(loader)

    @property
    def active(self) -> Loader | None:
        """The innermost; None outside of all."""
        return self._stack[-1] if self._stack else None

    @property
    def at_end(self) -> bool:
        """Whether the innermost has handed out its last batch."""
        return bool(self._stack) and self._stack[-1].end_of_dataloader

    def _remove(self, loader: Any) -> None:
        self._stack = [other for other in self._stack if other is not loader]
