"""DeepSpeed's ZeRO through its own API, on CPU.

DeepSpeed keeps an fp32 copy of this rank's part of the parameters even where the model is in fp32.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))  # it would count NUMA nodes

import deepspeed  # noqa: E402 - it reads the environment
from torch import Tensor  # noqa: E402
from torch.optim import Optimizer  # noqa: E402

from benchmarks.models import build_optimizer  # noqa: E402
from benchmarks.peers.base import Peer  # noqa: E402
from benchmarks.peers.deepspeed_settings import settings  # noqa: E402

_TAG = "checkpoint"


class DeepSpeedZeRO(Peer):
    """``deepspeed.initialize`` with one of its stages."""

    def wrap(self) -> None:
        """``initialize``; the ranks have met already, and DeepSpeed joins them."""
        bare = build_optimizer(self.module.parameters(), self.config)
        self.engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=bare, config=settings(self.config, self.arguments["stage"])
        )
        self.model, self.optimizer = self._forward, self.engine.optimizer

    def forward_context(self) -> AbstractContextManager[Any]:
        """Nothing: the model itself is in bf16, if asked for."""
        return nullcontext()

    @contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """DeepSpeed counts micro-batches by calls of its ``step``."""
        yield
        if not is_last:
            self.engine.step()

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's backward; the loss is divided by the number of micro-batches already."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def clear(self) -> None:
        """Nothing: its ``step`` clears gradients."""

    def update(self) -> None:
        """Its ``step``, which updates at the last micro-batch."""
        self.engine.step()

    def optimizers(self) -> list[Optimizer]:
        """Torch's optimizer, on DeepSpeed's fp32 copies."""
        return [self.engine.optimizer.optimizer]

    def more(self) -> dict[str, list[Tensor]]:
        """What stage 3 hides."""
        return held_by(self.engine)

    def save(self, path: Path) -> None:
        """Its ``save_checkpoint``: a file of the model, and one of each rank's optimizer state."""
        self.engine.save_checkpoint(str(path), tag=_TAG)

    def load(self, path: Path) -> None:
        """Its ``load_checkpoint``."""
        if self.engine.load_checkpoint(str(path), tag=_TAG)[0] is None:
            raise RuntimeError(f"Expected DeepSpeed to load {path}, it has not.")

    def teardown(self) -> None:
        """Take its hooks off."""
        self.engine.destroy()
        del self.engine
        super().teardown()

    def _forward(self, *batch: Tensor) -> Tensor:
        if self.config.precision != "32-true":
            batch = tuple(tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in batch)
        loss: Tensor = self.engine(*batch)
        return loss


def held_by(engine: Any) -> dict[str, list[Tensor]]:
    """What stage 3 keeps out of sight: parts of parameters as attributes of what is empty, gradients in a buffer."""
    parts = [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
    buffer = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    return {"parameters": parts, "gradients": [] if buffer is None else [buffer]}
