"""torch's DistributedDataParallel."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from benchmarks.models import build_optimizer
from benchmarks.peers.base import Peer, bucket_bytes


class TorchDDP(Peer):
    """DDP with its defaults: the reference."""

    ddp: DistributedDataParallel

    def wrap(self) -> None:
        """Wrap first, optimizer second, as torch's own tutorial does."""
        self.model = self.ddp = DistributedDataParallel(self.module)
        self.optimizer = build_optimizer(self.module.parameters(), self.config)

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """DDP's ``no_sync`` for all micro-batches but the last."""
        return nullcontext() if is_last else self.ddp.no_sync()

    def unseen(self) -> int:
        """The reduction buckets."""
        return bucket_bytes(self.ddp)
