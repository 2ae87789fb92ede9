"""Lightning's whole Trainer with one of its strategies, or with one of ours."""

import gc
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from benchmarks.config import Config
from benchmarks.measure import Probe
from benchmarks.models import Batch, Batches, build_model, build_optimizer
from benchmarks.peers.base import Peer, bucket_bytes
from benchmarks.peers.shard import shard
from benchmarks.saving import LOST_STEPS, Saving, Stopwatch


class TrainerPeer(Peer):
    """``Trainer(strategy=...).fit`` inside the ranks that the benchmark has started.

    The Trainer's loop cannot be stopped between two steps and resumed, so each `run` is a whole ``fit`` from the
    initial weights, with the probe held from the start of its first step after the warm-up to the end of its last one.
    """

    has_phases = False
    bare_optimizer: Optimizer

    def __init__(self, strategy: str) -> None:
        super().__init__(strategy=strategy)
        if strategy.startswith("accel"):
            import_module("lightning_accel")  # registers the name; here, so that it is no part of the peer's memory

    def setup(self, config: Config) -> None:
        """Only the batches: each fit builds and wraps a model of its own."""
        self.config = config
        self.batches = Batches(config)
        self.history = []
        self.found: dict[str, int] = {}

    def wrap(self) -> None:
        """The model of the next fit; the Trainer wraps it, and asks for the optimizer."""
        self.module = build_model(self.config)

    def first_step(self) -> None:
        """Fit one step."""
        self._fit(1 - self.config.warmup)

    def run(self, steps: int, probe: Probe | None = None) -> None:
        """Fit the warm-up steps, then `steps` more with `probe` held around them."""
        first = self.config.warmup * self.config.accumulate
        self._fit(steps, _Around(probe, first, first + steps * self.config.accumulate - 1))

    def report(self) -> dict[str, int]:
        """The bytes that this rank holds when an update is due, by kind; fits one more time to find out."""
        self._fit(1, _Count(self))
        return self.found

    def save(self, path: Path) -> None:
        """``trainer.save_checkpoint``: what it makes of the path, a file or a directory, is up to the strategy."""
        self.trainer.save_checkpoint(path / "checkpoint.ckpt")

    def load(self, path: Path) -> None:
        """What the strategy does for ``fit(ckpt_path=...)``, in the midst of a fit."""
        strategy = self.trainer.strategy
        checkpoint = strategy.load_checkpoint(path / "checkpoint.ckpt", weights_only=True)
        strategy.load_model_state_dict(checkpoint)
        strategy.load_optimizer_state_dict(checkpoint)

    def time_saving(self, folder: Path, times: int) -> Saving:
        """Save and load within one more fit, whose batches come again after the loads."""
        stopwatch = Stopwatch(self, self.config.rank, folder, times)
        start = self.config.warmup
        lost = [*range(start, start + LOST_STEPS)]
        around = _SaveAndLoad(stopwatch, *((step * self.config.accumulate - 1) for step in (start, start + LOST_STEPS)))
        self._fit(2 * LOST_STEPS, around, batches_of=[*range(start), *lost, *lost])
        losses = self.history.pop()
        return stopwatch.result(losses[0], losses[start : start + LOST_STEPS], losses[start + LOST_STEPS :])

    def strategy(self) -> Any:
        """What the Trainer is told."""
        return self.arguments["strategy"]

    def teardown(self) -> None:
        """Nothing: a fit leaves nothing behind."""

    def optimizers(self) -> list[Optimizer]:
        """The optimizer of the fit that runs."""
        return [self.bare_optimizer]

    def more(self) -> Mapping[str, Iterable[Tensor]]:
        """What our engine holds, if the strategy is one of ours."""
        if not self.arguments["strategy"].startswith("accel"):
            return {}
        engine = import_module("lightning_accel").engine_of(self.trainer.lightning_module)
        # Its optimizers show this rank's parts within their step only, and Lightning runs backward inside of that.
        return {
            "parameters": [unit.memory.mine for unit in engine.units],
            "gradients": [tensor for added in engine.optimizers for tensor in added.gradients.tensors()],
        }

    def unseen(self) -> int:
        """DDP's reduction buckets, where the strategy has wrapped the module in DDP."""
        model = self.trainer.strategy.model
        return bucket_bytes(model) if isinstance(model, DistributedDataParallel) else 0

    def _fit(self, steps: int, callback: Callback | None = None, batches_of: Sequence[int] | None = None) -> None:
        """Fit the warm-up steps and `steps` more, on the batches of steps 0, 1, 2, … unless others are given."""
        config = self.config
        self.wrap()
        sharded = self.arguments["strategy"] == "model_parallel"
        task = (_ShardedTask if sharded else _Task)(self)
        last = config.warmup + steps
        self.trainer = lightning.Trainer(
            accelerator="cpu",
            devices=config.ranks,
            strategy=ModelParallelStrategy(config.ranks, 1) if sharded else self.strategy(),
            precision=config.precision,
            max_steps=last,
            accumulate_grad_batches=config.accumulate,
            callbacks=[] if callback is None else [callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # the batches are this rank's already
        )
        batches = [batch for step in batches_of or range(last) for batch in self.batches.of_rank(step)]
        # A bare list would be taken for a list of loaders.
        self.trainer.fit(task, train_dataloaders=DataLoader(cast(Any, batches), batch_size=None))
        of_step = [task.losses[i : i + config.accumulate] for i in range(0, len(task.losses), config.accumulate)]
        self.history.append([sum(losses) / len(losses) for losses in of_step])
        # The model of this fit sits in reference cycles; it must not be there beside that of the next one.
        del self.module, self.bare_optimizer, self.trainer, task, callback
        gc.collect()


class _Task(lightning.LightningModule):
    """The benchmark's model as a LightningModule."""

    def __init__(self, peer: TrainerPeer) -> None:
        super().__init__()
        self.net = peer.module
        self.peer = peer
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        loss: Tensor = self.net(*batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Optimizer:
        """The optimizer that every peer runs."""
        self.peer.bare_optimizer = build_optimizer(self.net.parameters(), self.peer.config)
        return self.peer.bare_optimizer


class _ShardedTask(_Task):
    """The same as Lightning's ModelParallelStrategy asks for it: the module applies FSDP2 to itself."""

    def configure_model(self) -> None:
        """Shard each block and the root, once."""
        if not isinstance(self.net, FSDPModule):
            shard(self.net, self.device_mesh["data_parallel"])


class _Around(Callback):
    """Enters the probe, if any, at the start of micro-batch `first` and leaves it at the end of micro-batch `last`."""

    def __init__(self, probe: Probe | None, first: int, last: int) -> None:
        self.probe, self.first, self.last = probe, first, last

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Enter the probe."""
        if self.probe is not None and batch_idx == self.first:
            self.probe.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Leave the probe."""
        if self.probe is not None and batch_idx == self.last:
            self.probe.__exit__(None, None, None)


class _Count(Callback):
    """Counts the bytes when the last update is due."""

    def __init__(self, peer: TrainerPeer) -> None:
        self.peer = peer

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Lightning runs backward inside ``optimizer.step``, so torch's own hook comes too early."""
        if trainer.global_step == trainer.max_steps - 1:
            self.peer.found = self.peer.count()


class _SaveAndLoad(Callback):
    """Saves at the end of one micro-batch and loads at the end of another."""

    def __init__(self, stopwatch: Stopwatch, save: int, load: int) -> None:
        self.stopwatch, self.save, self.load = stopwatch, save, load

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save, or load."""
        if batch_idx == self.save:
            self.stopwatch.save()
        elif batch_idx == self.load:
            self.stopwatch.load()
