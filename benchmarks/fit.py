"""Whether a model fits into the machine's memory: said before anything is tried, from its number of parameters."""

import psutil
import torch

from benchmarks.config import Config
from benchmarks.models import build_model

BYTES_PER_PARAMETER = 20
"""Parameters, gradients, AdamW's two moments, and DDP's buckets or DeepSpeed's second copy, in fp32."""
BYTES_PER_PROCESS = 500 * 2**20
"""What a process with torch and Lightning takes before it has a model, and some activations."""


def needed_bytes(config: Config, peers: int) -> int:
    """The least that a run takes: the reference and one more peer are alive at a time, if there are two."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
    return min(peers, 2) * config.ranks * (BYTES_PER_PARAMETER * parameters + BYTES_PER_PROCESS)


def shortage(config: Config, peers: int) -> str | None:
    """Why a run does not fit into the memory that is free now, or None if it does.

    Args:
        config: The run.
        peers: How many peers take part.
    """
    needed, free = needed_bytes(config, peers), psutil.virtual_memory().available
    if needed <= free:
        return None
    return (
        f"{config.model} on {config.ranks} ranks does not fit: about {needed / 2**30:.1f} GiB are needed "
        f"({BYTES_PER_PARAMETER} bytes per parameter and rank, for {min(peers, 2)} peers at a time), "
        f"{free / 2**30:.1f} GiB are free. Take a smaller --model or fewer --ranks."
    )
