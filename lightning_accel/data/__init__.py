"""Batches for ranks: dealt, split or sent, resumed where they were, and joined where they are uneven.

Knows torch and torch.distributed only.
"""

from lightning_accel.data.joining import JoinedLoader, join_uneven_inputs, joined
from lightning_accel.data.loader import ShardedLoader
from lightning_accel.data.preparing import prepare_data_loader, skip_first_batches

__all__ = [
    "JoinedLoader",
    "ShardedLoader",
    "join_uneven_inputs",
    "joined",
    "prepare_data_loader",
    "skip_first_batches",
]
