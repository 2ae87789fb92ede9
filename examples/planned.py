"""A model for ``accel plan``: the GPT of the other examples, larger, and a batch of it.

accel plan examples/planned.py:gpt_1b --ranks 8 --memory 24GB
"""

import torch
from gpt import LitGPT
from torch import Tensor


def gpt_1b() -> tuple[LitGPT, Tensor]:
    """1.3 billion parameters, and 4 windows of 1,024 tokens for each rank."""
    return LitGPT(32_000, 2048, 24, 16, tie=True), torch.empty(4, 1025, dtype=torch.long)
