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


class Accumulation:
    """Where the loop is within a window.

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
        self.window = 0
        """How many windows have begun."""
        self.backwards = 0
        """How many backwards there were since the window began."""
        self._done = 0

    def set_steps(self, steps: int) -> None:
        """Change how many micro-batches a whole window has.

        Raises:
            ValueError: If it is not positive.

        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"Expected gradient_accumulation_steps to be a whole number of 1 or more, got {steps!r}.")
        self.steps = steps

    @property
    def is_open(self) -> bool:
        """Whether there are micro-batches that no optimizer step has used yet."""
        return self._done > 0

    def advance(self, *, ends: bool) -> bool:
        """Begin a micro-batch.

        Args:
            ends: Whether it is the last one of its loader.

        Returns:
            ``sync_gradients``.

        """
        if self._done == 0:
            self.window += 1
            self.backwards = 0
        self._done += 1
        self.sync_gradients = ends or self._done >= self.steps
        self.correction = self.steps / self._done if self.sync_gradients else 1.0
        if self.sync_gradients:
            self._done = 0
        return self.sync_gradients

    def reset(self) -> None:
        """Begin anew, as after a checkpoint was loaded."""
        self._done, self.sync_gradients, self.correction = 0, True, 1.0
