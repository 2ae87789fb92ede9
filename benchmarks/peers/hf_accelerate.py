"""Hugging Face Accelerate."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.models import build_optimizer
from benchmarks.peers.base import Peer, bucket_bytes

_PRECISIONS = {"32-true": "no", "bf16-mixed": "bf16"}


class AccelerateDDP(Peer):
    """``Accelerator.prepare`` on CPU, which wraps the model in DDP."""

    ddp: DistributedDataParallel

    def wrap(self) -> None:
        """``prepare``; the environment already says which rank this is."""
        self.accelerator = Accelerator(cpu=True, mixed_precision=_PRECISIONS[self.config.precision])
        self.bare_optimizer = build_optimizer(self.module.parameters(), self.config)
        prepared: Any = self.accelerator.prepare(self.module, self.bare_optimizer)
        self.model, self.optimizer = prepared[0], cast(Optimizer, prepared[1])
        assert isinstance(prepared[0], DistributedDataParallel)
        self.ddp = prepared[0]

    def forward_context(self) -> AbstractContextManager[Any]:
        """Nothing: the prepared model autocasts by itself."""
        return nullcontext()

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Accelerate's ``no_sync`` for all micro-batches but the last."""
        context: AbstractContextManager[Any] = nullcontext() if is_last else self.accelerator.no_sync(self.ddp)
        return context

    def backward(self, loss: Tensor) -> None:
        """Accelerate's backward."""
        self.accelerator.backward(loss)

    def save(self, path: Path) -> None:
        """Its ``save_state``."""
        self.accelerator.save_state(str(path))

    def load(self, path: Path) -> None:
        """Its ``load_state``."""
        self.accelerator.load_state(str(path))

    def optimizers(self) -> list[Optimizer]:
        """The optimizer below Accelerate's."""
        return [self.bare_optimizer]

    def unseen(self) -> int:
        """DDP's reduction buckets."""
        return bucket_bytes(self.ddp)
