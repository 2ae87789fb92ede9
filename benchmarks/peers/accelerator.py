"""Our ``Accelerator``, beside Hugging Face's."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from benchmarks.models import build_optimizer
from benchmarks.peers.base import Peer
from lightning_accel import Accelerator, engine_of

_PRECISIONS = {"32-true": "no", "bf16-mixed": "bf16"}


class AcceleratorPeer(Peer):
    """``Accelerator(strategy=...).prepare``: a plain loop, as with Accelerate."""

    def wrap(self) -> None:
        """``prepare``; the environment already says which rank this is."""
        precision, strategy = _PRECISIONS[self.config.precision], self.arguments["strategy"]
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision, strategy=strategy)
        self.bare_optimizer = build_optimizer(self.module.parameters(), self.config)
        prepared: Any = self.accelerator.prepare(self.module, self.bare_optimizer)
        self.model, self.optimizer = prepared[0], cast(Optimizer, prepared[1])

    def forward_context(self) -> AbstractContextManager[Any]:
        """Nothing: the prepared model autocasts by itself."""
        return nullcontext()

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """``no_sync`` for all micro-batches but the last; rows with sharded gradients reduce anyway."""
        context: AbstractContextManager[Any] = nullcontext() if is_last else self.accelerator.no_sync(self.model)
        return context

    def backward(self, loss: Tensor) -> None:
        """The Accelerator's backward."""
        self.accelerator.backward(loss)

    def settle(self) -> None:
        """The gathers after the update, which the next forward waits for."""
        engine_of(self.module).wait()

    def save(self, path: Path) -> None:
        """Its ``save_state``."""
        self.accelerator.save_state(path / "state")

    def load(self, path: Path) -> None:
        """Its ``load_state``."""
        self.accelerator.load_state(path / "state")

    def optimizers(self) -> list[Optimizer]:
        """The optimizer below the prepared one."""
        return [self.bare_optimizer]

    def own_report(self) -> dict[str, Any] | None:
        """The engine's own figures."""
        return engine_of(self.module).report().to_dict()
