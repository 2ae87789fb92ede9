"""Our engine, without Lightning."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import build_optimizer
from benchmarks.peers.base import Peer
from lightning_accel.core import Engine
from lightning_accel.core.placement import Rest, find_row


class AccelEngine(Peer):
    """One row of the placement table."""

    def wrap(self) -> None:
        """The module stays what it is; the engine hangs on it."""
        self.model = self.module
        self.optimizer = build_optimizer(self.module.parameters(), self.config)
        row = find_row(self.arguments["row"])
        mixed = self.config.precision == "bf16-mixed" and row.optimizer_state is Rest.SHARDED
        self.engine = Engine(
            self.module,
            row,
            shard_size=self.arguments.get("shard_size"),
            # As precision="bf16-mixed" does with our strategies: under autocast, matrices are gathered in bf16.
            param_dtype=torch.bfloat16 if mixed else None,
        )
        self.engine.add_optimizer(self.optimizer)
        self.engine.build()

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """The engine's ``no_sync`` for all micro-batches but the last; rows with sharded gradients reduce anyway."""
        return nullcontext() if is_last else self.engine.no_sync()

    def backward(self, loss: Tensor) -> None:
        """The engine's backward, which starts the communication."""
        self.engine.backward(loss)

    def settle(self) -> None:
        """The gathers after the update, which the next forward waits for."""
        self.engine.wait()

    def own_report(self) -> dict[str, Any] | None:
        """The engine's own figures."""
        return self.engine.report().to_dict()

    def teardown(self) -> None:
        """Take the engine off the module."""
        self.engine.close()
        super().teardown()
