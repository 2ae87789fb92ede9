"""torch's ZeroRedundancyOptimizer, its ZeRO-1."""

from pathlib import Path

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.peers.torch_ddp import TorchDDP


class TorchZeRO(TorchDDP):
    """DDP whose optimizer state is cut by whole parameters; each rank broadcasts the ones it has updated."""

    optimizer: ZeroRedundancyOptimizer

    def wrap(self) -> None:
        """DDP, and the optimizer's class in place of the optimizer."""
        self.model = self.ddp = DistributedDataParallel(self.module)
        self.optimizer = ZeroRedundancyOptimizer(
            self.module.parameters(),
            optimizer_class=torch.optim.AdamW,
            lr=self.config.learning_rate,
            eps=self.config.epsilon,
            fused=True,
        )

    def save(self, path: Path) -> None:
        """Rank 0 collects the parts of all ranks, and saves."""
        self.optimizer.consolidate_state_dict(to=0)
        super().save(path)

    def optimizers(self) -> list[Optimizer]:
        """The inner optimizer, which holds this rank's part of the state."""
        return [self.optimizer.optim]
