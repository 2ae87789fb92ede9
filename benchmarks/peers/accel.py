"""Our engine, without Lightning."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.models import build_optimizer
from benchmarks.peers.base import Peer
from lightning_accel.core import Engine
from lightning_accel.core.checkpoint import Reader, Saver
from lightning_accel.core.checkpoint.engine_state import load_model, model_shards, optimizer_shards
from lightning_accel.core.checkpoint.nest import put_tensors
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
            group=self.group(),
            shard_size=self.arguments.get("shard_size"),
            # As precision="bf16-mixed" does with our strategies: under autocast, matrices are gathered in bf16.
            param_dtype=torch.bfloat16 if mixed else None,
        )
        self.added = self.engine.add_optimizer(self.optimizer)
        self.engine.build()
        collectives = self.engine.collectives
        self.saver = Saver(collectives.gather_objects, collectives.rank)

    def group(self) -> dist.ProcessGroup | None:
        """The ranks that train together; all, if None."""
        return None

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """The engine's ``no_sync`` for all micro-batches but the last; rows with sharded gradients reduce anyway."""
        return nullcontext() if is_last else self.engine.no_sync()

    def backward(self, loss: Tensor) -> None:
        """The engine's backward, which starts the communication."""
        self.engine.backward(loss)

    def save(self, path: Path) -> None:
        """A directory, of which each rank writes its part."""
        self.begin_saving(path, background=False)

    def begin_saving(self, path: Path, *, background: bool) -> None:
        """The same, but for what can be done in the background, if wanted."""
        self.saver.save(path / "checkpoint", self.state(), background=background)

    def state(self) -> dict[str, Any]:
        """This rank's parts."""
        return {"state_dict": model_shards(self.engine), "optimizer_states": [optimizer_shards(self.added)]}

    def load(self, path: Path) -> None:
        """A directory of any row and number of ranks."""
        reader = Reader(path / "checkpoint")
        saved = put_tensors(reader.objects(), reader.tensors())
        load_model(self.module, saved["state_dict"], engine=self.engine)
        self.optimizer.load_state_dict(saved["optimizer_states"][0])

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
