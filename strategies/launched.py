"""What strategies have in common whoever's engine trains: how their ranks start, and what they are called.

[Note: wrappers of an optimizer]
Lightning wraps each optimizer in an object of a class that derives from the optimizer's, and makes new ones whenever
the list is set. One that is dropped must not do what the optimizer does at its own end: DeepSpeedCPUAdam frees what its
kernel keeps then, and the next step would crash the process.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import _StrategyRegistry
from lightning.fabric.utilities.types import ReduceOp
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.strategies.options import reject_unknown

START_METHODS: dict[str, Literal["popen", "spawn", "fork"]] = {
    "": "popen",
    "_spawn": "spawn",
    "_fork": "fork",
    "_notebook": "fork",
}
"""Suffixes of registered names, and the way each starts its processes."""


class AccelLaunchedStrategy(DDPStrategy):
    """Base of the Trainer strategies that have a process for each device.

    It derives from Lightning's ``DDPStrategy`` for what is no concern of an engine: launching, process groups,
    cluster environments, barriers. Lightning also looks for that class in several places (samplers for the ranks,
    ``sync_dist``, compiled modules).

    Args:
        accelerator: As for Lightning's strategies, likewise the next five.
        parallel_devices: The devices of this node.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: Reads and writes checkpoint files.
        precision_plugin: The precision.
        process_group_backend: ``"gloo"``, ``"nccl"``, …; by default what suits the device.
        timeout: Longest wait for a collective.
        start_method: How the ranks of this node are started: ``"popen"``, ``"spawn"`` or ``"fork"``.
        unknown: Options that do not exist; refused.

    """

    def __init__(
        self,
        *,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork"] = "popen",
        **unknown: Any,
    ) -> None:
        reject_unknown(type(self), unknown)
        require_start_method(start_method)
        self._failed = False
        self._at_teardown = ExitStack()
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )

    @property
    @override
    def is_distributed(self) -> bool:
        """Lightning injects samplers and reduces metrics by this."""
        return True

    @property
    @override
    def optimizers(self) -> list[Optimizer]:
        """The optimizers. See [Note: wrappers of an optimizer]."""
        return self._optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers
        self._lightning_optimizers = [LightningOptimizer._to_lightning_optimizer(one, self) for one in optimizers]
        for wrapper in self._lightning_optimizers:
            if hasattr(type(wrapper), "__del__"):
                type(wrapper).__del__ = _do_nothing  # type: ignore[attr-defined]

    @override
    def reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        """Reduce a tensor over ranks; the mean of integers is a fraction."""
        return super().reduce(fractional(tensor, reduce_op), group, reduce_op)


def _do_nothing(_: object) -> None: ...


def require_start_method(start_method: str) -> None:
    """Raise unless ranks can be started so."""
    if start_method not in START_METHODS.values():
        raise ValueError(f"Expected start_method to be 'popen', 'spawn' or 'fork', got {start_method!r}.")


def register_each(registry: _StrategyRegistry, kind: type, name: str, about: str, **arguments: Any) -> None:
    """Register a strategy under a name, with a suffix for each way to start ranks.

    Args:
        registry: The Trainer's or Fabric's.
        kind: The strategy.
        name: Without suffix.
        about: What is run, for the description.
        arguments: What chooses it.

    """
    for suffix, start_method in START_METHODS.items():
        if f"{name}{suffix}" not in registry:
            registry.register(
                f"{name}{suffix}",
                kind,
                description=f"{kind.__name__}, {about}, ranks started by {start_method}",
                start_method=start_method,
                **arguments,
            )


def evaluate_writably(trainer: pl.Trainer) -> None:
    """Have a Trainer evaluate without inference mode: what tensors it creates then could not be written to later."""
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop.inference_mode = False
    trainer.predict_loop.inference_mode = False


def fractional(tensor: Tensor | Any, reduce_op: ReduceOp | str | None) -> Tensor | Any:
    """A tensor that can hold the mean of what it is; other objects, and for other reductions, itself."""
    mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
    if mean and isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.to(torch.get_default_dtype())
    return tensor
