"""Random numbers that can be had again."""

from __future__ import annotations

import os
import random
import sys

import torch
import torch.distributed as dist


def set_seed(seed: int, device_specific: bool = False) -> None:
    """Seed the random numbers of Python, numpy (if it is in use) and torch, those of its accelerators included.

    Args:
        seed: 0 to 2**32 - 1.
        device_specific: Have every rank draw other numbers: its rank is added to the seed. Prepared loaders shuffle in
            one order on all ranks either way.

    Raises:
        ValueError: If it is not such a number.

    """
    seed += rank_of_process() if device_specific else 0
    if not 0 <= seed < 2**32:
        raise ValueError(f"Expected a seed from 0 to {2**32 - 1} on every rank, got {seed} on this one.")
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    torch.manual_seed(seed)


def rank_of_process() -> int:
    """The rank of this process: of the process group, or else as launchers tell it; 0 if there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))
