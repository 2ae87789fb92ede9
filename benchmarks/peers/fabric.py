"""Lightning Fabric's loop with one of its strategies, or with one of ours."""

from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, cast

import lightning
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.models import build_optimizer
from benchmarks.peers.base import Peer, bucket_bytes


class FabricPeer(Peer):
    """``Fabric(strategy=...)`` inside the ranks that the benchmark has started."""

    fabric: lightning.Fabric
    wrapped: Any

    def __init__(self, strategy: str) -> None:
        super().__init__(strategy=strategy)
        if strategy.startswith("accel"):
            import_module("lightning_accel")  # registers the name; here, so that it is no part of the peer's memory

    def wrap(self) -> None:
        """``fabric.setup``; the environment already says which rank this is, so Fabric launches nothing."""
        self.fabric = lightning.Fabric(
            accelerator="cpu", devices=self.config.ranks, strategy=self.arguments["strategy"]
        )
        self.fabric.launch()
        self.bare_optimizer = build_optimizer(self.module.parameters(), self.config)
        self.wrapped, wrapped_optimizer = self.fabric.setup(self.module, self.bare_optimizer)
        self.model, self.optimizer = self.wrapped, cast(Optimizer, wrapped_optimizer)

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Fabric's ``no_backward_sync`` for all micro-batches but the last."""
        return self.fabric.no_backward_sync(self.wrapped, enabled=not is_last)

    def backward(self, loss: Tensor) -> None:
        """Fabric's backward."""
        self.fabric.backward(loss)

    def optimizers(self) -> list[Optimizer]:
        """The optimizer below Fabric's."""
        return [self.bare_optimizer]

    def unseen(self) -> int:
        """DDP's reduction buckets, where Fabric has wrapped the module in DDP."""
        inner = self.wrapped._forward_module
        return bucket_bytes(inner) if isinstance(inner, DistributedDataParallel) else 0
