"""Windows of micro-batches: which of them ends one, and what its gradients have to be multiplied by.

One window is what one optimizer step is made of. With 4 accumulation steps and a loader of 6 batches::

    batch      0  1  2  3 | 4  5 |
    reduced    -  -  -  x | -  x |     the loader's end closes a window
    loss       /4 /4 /4 /4  /4 /4
    gradients           x1     x2      4 / 2: a mean over the two batches that are in it

[Note: short windows]
How long a window is becomes known when it is closed: loaders of unknown length have short ones as well. So every loss
is divided by the number of steps, as Accelerate's users know it, and what was accumulated in a short window is
multiplied once, before the first clipping, unscaling or step that uses it (``PreparedOptimizer.settle``). Accelerate
leaves it divided by the full number: its last step of an epoch is too small.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass
class _Window:
    number: int
    done: int = 0  # micro-batches that have begun
    backwards: int = 0


class Accumulation:
    """Where the loop is within a window. Models that are trained in turns have windows of their own.

    Args:
        steps: Micro-batches of a whole window.

    Raises:
        ValueError: If it is not positive.

    """

    def __init__(self, steps: int) -> None:
        self.set_steps(steps)
        self.sync_gradients = True
        """Whether the micro-batch that is under way closes its window."""
        self.correction = 1.0
        """What the gradients of a window that is closed are to be multiplied by."""
        self._begun = 0
        self._current = _Window(0)
        self._open: dict[Hashable, _Window] = {}

    def set_steps(self, steps: int) -> None:
        """Change how many micro-batches a whole window has.

        Raises:
            ValueError: If it is not positive.

        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"Expected gradient_accumulation_steps to be a whole number of 1 or more, got {steps!r}.")
        self.steps = steps

    @property
    def window(self) -> int:
        """The number of the window of the micro-batch that began last: no two have the same. 0 if none has begun."""
        return self._current.number

    @property
    def backwards(self) -> int:
        """How many backwards there were since that window began."""
        return self._current.backwards

    @property
    def is_open(self) -> bool:
        """Whether there are micro-batches that no optimizer step has used yet."""
        return bool(self._open)

    def is_over(self, number: int) -> bool:
        """Whether a window is closed, and another has begun since."""
        return number != self.window and all(window.number != number for window in self._open.values())

    def note_backward(self) -> None:
        """Count a backward."""
        self._current.backwards += 1

    def advance(self, *, ends: bool, of: Hashable = None) -> bool:
        """Begin a micro-batch.

        Args:
            ends: Whether it is the last one of its loader.
            of: What is trained with it; other things have other windows.

        Returns:
            ``sync_gradients``.

        """
        window = self._open.pop(of, None)
        if window is None:
            self._begun += 1
            window = _Window(self._begun)
        self._current = window
        window.done += 1
        self.sync_gradients = ends or window.done >= self.steps
        self.correction = self.steps / window.done if self.sync_gradients else 1.0
        if not self.sync_gradients:
            self._open[of] = window
        return self.sync_gradients

    def reset(self) -> None:
        """Begin anew, as after a checkpoint was loaded."""
        self._open.clear()
        self._current = _Window(self._begun)
        self.sync_gradients, self.correction = True, 1.0
