"""Which dimension of a tensor is cut, as pure arithmetic.

XLA cuts along whole dimensions, unlike the flat buffers of the other executor (core/layout.py). A cut of ``size`` into
``parts`` gives every device ceil(size / parts), so sizes that do not divide are padded, on the last devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

REPLICATE, SHARD = "replicate", "shard"
"""The axes of the mesh, as in core/mesh.py."""

Axes = str | tuple[str, ...] | None
Spec = tuple[Axes, ...]
"""For each dimension of a tensor the axis or axes it is cut over, or None: torch_xla's partition spec."""


def replicated(shape: Sequence[int]) -> Spec:
    """Every device has all of it."""
    return (None,) * len(shape)


def sharded(shape: Sequence[int], parts: int) -> Spec:
    """Cut along the dimension that leaves each device the least; along the first of several that do.

    What cannot be made smaller (scalars, sizes of 1) is replicated.
    """
    best, share = None, 1.0
    for dimension, size in enumerate(shape):
        kept = _kept(size, parts) / size if size else 1.0
        if kept < share:
            best, share = dimension, kept
    return tuple(SHARD if dimension == best else None for dimension in range(len(shape)))


def batched(shape: Sequence[int]) -> Spec:
    """Cut along the first dimension, over all devices. Scalars are replicated."""
    return ((REPLICATE, SHARD), *(None,) * (len(shape) - 1)) if len(shape) else ()


def elements_on_one(shape: Sequence[int], spec: Spec, parts: int) -> int:
    """How many elements one device keeps, padding included.

    Args:
        shape: Of the whole tensor.
        spec: From ``sharded`` or ``replicated``.
        parts: The size of the shard axis.

    """
    return math.prod(_kept(size, parts) if axes == SHARD else size for size, axes in zip(shape, spec, strict=True))


def _kept(size: int, parts: int) -> int:
    return -(-size // parts)
