"""Activation checkpointing inside the model itself, so that it is the same for every peer."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputable(nn.Module):
    """A block that may throw its activations away in forward and compute them again in backward.

    Subclasses have `compute` in place of ``forward``. The block is what peers wrap, so their hooks are outside.

    Args:
        recompute: Whether it does.
    """

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        """`compute`, with or without keeping activations."""
        if not self.recompute:
            return self.compute(x)
        # No random numbers are drawn in these blocks, so there is no state of a generator to keep.
        y: Tensor = checkpoint(self.compute, x, use_reentrant=False, preserve_rng_state=False)
        return y

    def compute(self, x: Tensor) -> Tensor:
        """The block's own computation."""
        raise NotImplementedError
