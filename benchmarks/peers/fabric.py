"""Lightning Fabric's loop with one of its strategies, or with one of ours."""

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import lightning
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.models import build_optimizer
from benchmarks.peers.base import Peer, bucket_bytes
from benchmarks.peers.shard import shard


def _sharded(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    shard(module, mesh["data_parallel"])
    return module


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
        config, strategy = self.config, self.arguments["strategy"]
        sharded = strategy == "model_parallel"
        self.fabric = lightning.Fabric(
            accelerator="cpu",
            devices=config.ranks,
            strategy=ModelParallelStrategy(_sharded, config.ranks, 1) if sharded else self.strategy(),
            precision=config.precision,
        )
        self.fabric.launch()
        if sharded:  # model first and optimizer second, as Lightning asks for with this strategy
            self.wrapped = self.fabric.setup_module(self.module)
            self.bare_optimizer = build_optimizer(self.module.parameters(), config)
            wrapped_optimizer = self.fabric.setup_optimizers(self.bare_optimizer)
        else:
            self.bare_optimizer = build_optimizer(self.module.parameters(), config)
            self.wrapped, wrapped_optimizer = self.fabric.setup(self.module, self.bare_optimizer)
        self.model, self.optimizer = self.wrapped, cast(Optimizer, wrapped_optimizer)

    def strategy(self) -> Any:
        """What Fabric is told."""
        return self.arguments["strategy"]

    def forward_context(self) -> AbstractContextManager[Any]:
        """Nothing: Fabric's module autocasts by itself."""
        return nullcontext()

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Fabric's ``no_backward_sync`` for all micro-batches but the last; FSDP2 reduces each of them."""
        if self.arguments["strategy"] == "model_parallel":
            return nullcontext()
        return self.fabric.no_backward_sync(self.wrapped, enabled=not is_last)

    def backward(self, loss: Tensor) -> None:
        """Fabric's backward."""
        self.fabric.backward(loss)

    def save(self, path: Path) -> None:
        """``fabric.save``: what it makes of the path, a file or a directory, is up to its strategy."""
        self.fabric.save(path / "checkpoint.ckpt", self.state())

    def state(self) -> dict[str, Any]:
        """What Fabric saves, and loads into."""
        return {"model": self.wrapped, "optimizer": self.optimizer}

    def load(self, path: Path) -> None:
        """``fabric.load``, in place."""
        self.fabric.load(path / "checkpoint.ckpt", self.state())

    def settle(self) -> None:
        """What our engine has in flight, if it is one of our strategies."""
        if self.arguments["strategy"].startswith("accel"):
            import_module("lightning_accel").engine_of(self.module).wait()

    def optimizers(self) -> list[Optimizer]:
        """The optimizer below Fabric's."""
        return [self.bare_optimizer]

    def unseen(self) -> int:
        """DDP's reduction buckets, where Fabric has wrapped the module in DDP."""
        inner = self.wrapped._forward_module
        return bucket_bytes(inner) if isinstance(inner, DistributedDataParallel) else 0
