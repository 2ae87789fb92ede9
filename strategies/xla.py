"""accel_xla for the Trainer: the rows on XLA devices, in one process (of each host).

[Note: what is a program]
What the Trainer does on the devices is recorded, and runs when it is cut off: after each optimizer step, after each
backward that no step follows, and after each step of an evaluation. So an optimizer step with all its batch has logged
is one program. A value that Python asks for in between (``.item()``, a condition) cuts there, too, and waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.strategies import _StrategyRegistry
from lightning.fabric.utilities.init import _EmptyInit
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.core import GradScaler
from lightning_accel.core.partition import Units
from lightning_accel.core.xla import XLAEngine
from lightning_accel.core.xla.hosts import hosts
from lightning_accel.plugins.xla_precision import suitable
from lightning_accel.strategies.evenness import require_even
from lightning_accel.strategies.files import LEFT_IN_FILE, in_memory, require_lightning
from lightning_accel.strategies.launched import evaluate_writably
from lightning_accel.strategies.options import Recomputed
from lightning_accel.strategies.resume import Continuation
from lightning_accel.strategies.saving import unwrap
from lightning_accel.strategies.xla_hosts import AmongHosts, no_transfer, require_equal_shares
from lightning_accel.strategies.xla_shared import (
    OneProgram,
    put_samples,
    read,
    seed_devices,
)
from lightning_accel.strategies.xla_values import fetched, with_scores_on


class AccelXLAStrategy(OneProgram, ParallelStrategy):
    """The placement rows on all XLA devices, through torch_xla.

    There is one process with one program over all devices. It loads the global batch: no sampler divides it. The batch
    is cut over the devices along the first dimension of its tensors, and a loss is that of the whole batch. On several
    hosts there is one process on each, which loads its part of the global batch (not run there, see docs/xla.md).

    Args:
        sharding: The row: ``"ddp"``, ``"zero1"``, ``"zero2"``, ``"zero3"``, ``"fsdp"``, ``"fsdp_partial"`` or
            ``"fsdp_hybrid"``.
        shard_size: For ``"fsdp_hybrid"``: how many neighbouring devices divide a copy of the model state, instead of
            all of this host.
        units: Names or classes of modules whose parameters are gathered together, if parameters rest sharded. Default:
            the members of the model's repeated block class.
        activation_checkpointing: Compute activations again in backward instead of keeping them: True for each unit's
            module, or names or classes of modules.
        grad_scaler: Scales losses under ``precision="16-mixed"``, instead of one with torch's defaults; under
            ``"bf16-mixed"`` it is a check for overflow.
        accelerator: As for Lightning's strategies, likewise the next two.
        checkpoint_io: Reads and writes checkpoint files.
        precision_plugin: The precision.
        unknown: Options that do not exist; refused.

    Raises:
        ValueError: If there is no such row, it takes no ``shard_size``, or ``activation_checkpointing`` says nothing.
        TypeError: If there are options that do not exist, or ``grad_scaler`` is another kind of scaler.

    """

    engine: XLAEngine | None
    """The engine of the current or last stage; None before."""

    def __init__(
        self,
        sharding: str = "fsdp",
        shard_size: int | None = None,
        units: Units | None = None,
        activation_checkpointing: Recomputed = False,
        grad_scaler: GradScaler | None = None,
        accelerator: pl.accelerators.Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        **unknown: Any,
    ) -> None:
        self._choose(sharding, shard_size, units, activation_checkpointing, grad_scaler, unknown)
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self.engine = None
        self._among_hosts: AmongHosts | None = None
        self._continuation = Continuation(self, gather=lambda own: hosts().gather(own))
        self._micro_batches = 0  # with a loss, since the last optimizer step
        self._is_complete = False

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """What is given, if it is on the devices: it is of the global batch. What is in host memory, over hosts."""
        return self._reduced(tensor, reduce_op)

    # ---------------------------------------------------------------- plugins

    @property
    @override
    def precision_plugin(self) -> Precision:
        """The precision plugin; autocast is that of XLA."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = None if precision_plugin is None else suitable(precision_plugin, self._given_scaler)

    @property
    @override
    def _plugin(self) -> Precision:
        return self.precision_plugin

    # ------------------------------------------------------------------ set-up

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Within it, tensors are made in host memory: they go to the devices, in parts, when a stage begins."""
        with _EmptyInit(enabled=bool(empty_init)), self.precision_plugin.tensor_init_context():
            yield

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._set_rank()

    @override
    def model_to_device(self) -> None:
        """Move the model to the devices, where it rests as the row says."""
        assert self.model is not None
        self.engine = self._start(self.model)
        self._scale_for(self.engine)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.engine = None
        if trainer.state.fn == TrainerFn.FITTING:
            self._continuation.take_up(trainer)
        if hosts().count > 1:
            self._among_hosts = AmongHosts(trainer)
        evaluate_writably(trainer)
        # Statistics of a batch are those of the global one: there are no layers to be synchronised.
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        assert self.engine is not None
        if trainer.state.fn == TrainerFn.FITTING:
            seed_devices()
            self.setup_optimizers(trainer)
            for optimizer in map(unwrap, self.optimizers):
                if not isinstance(optimizer, _MockOptimizer):
                    self.engine.add_optimizer(optimizer)
        self._end_step()
        self.setup_precision_plugin()

    @override
    def process_dataloader(self, dataloader: object) -> object:
        require_equal_shares(dataloader)
        return self._continuation.follow(dataloader)

    @property
    @override
    def is_distributed(self) -> bool:
        """Whether Lightning is to give loaders distributed samplers.

        It is on several hosts; on one it is if the fit goes on in the middle of an order that such samplers have.
        """
        return super().is_distributed or self._continuation.knows_order

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How samples are divided, where they are: each host loads its part of the global batch."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        if self.world_size > 1:
            require_even(self.lightning_module.trainer)
        self._continuation.start()

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Cut a batch over the devices, between Lightning's hooks for it.

        A ``transfer_batch_to_device`` of the user's is called first: what that moves is whole on each device.
        """
        module = self.lightning_module
        if module is None:
            return self._put(batch)
        name = "transfer_batch_to_device"
        hooks = module.trainer._data_connector._datahook_selector
        assert hooks is not None
        if is_overridden(name, hooks.get_instance(name)):
            if self.world_size > 1:
                raise no_transfer()
            batch = module._call_batch_hook(name, batch, device or self.root_device, dataloader_idx)
        return module._call_batch_hook("on_after_batch_transfer", self._put(batch), dataloader_idx)

    def _put(self, batch: Any) -> Any:
        assert self.engine is not None, "batches come after the model"
        return put_samples(batch, self.engine.put_batch, self.root_device)

    # ------------------------------------------------------------------- steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        output = super().training_step(*args, **kwargs)
        assert self.lightning_module is not None
        if not self.lightning_module.automatic_optimization:
            self._cut()  # what came after the last optimizer step, if there was any
        return output

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        output = super().validation_step(*args, **kwargs)
        self._cut()
        return output

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        output = super().test_step(*args, **kwargs)
        self._cut()
        return output

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().predict_step(*args, **kwargs)
        self._cut()
        return output

    @override
    def on_validation_end(self) -> None:
        self._cut_for_all()

    @override
    def on_test_end(self) -> None:
        self._cut_for_all()

    def _cut_for_all(self) -> None:
        """Have what an evaluation has found be computed before host 0 prints it; see strategies/xla_hosts.py."""
        if self.world_size > 1:
            self._cut()

    def _cut(self) -> None:
        assert self.engine is not None
        self.engine.cut()

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.engine is not None, "backward outside of fit"
        assert self.lightning_module is not None
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        with self.engine.backward_context():
            self.precision_plugin.backward(closure_loss, self.lightning_module, optimizer, *args, **kwargs)
            self._micro_batches += 1
            if self.engine.is_boundary:
                self._complete()
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        def complete() -> Any:
            result = closure()
            self._complete()  # if the last micro-batch had no loss
            return result

        result = super().optimizer_step(optimizer, complete, *args, **kwargs)
        self._end_step()
        return result

    def _complete(self) -> None:
        """Make gradients the mean over the micro-batches that were there, if an epoch ends before there were all."""
        module = self.lightning_module
        assert module is not None
        if self._is_complete or not module.automatic_optimization:
            return
        self._is_complete = True  # the closure may be called again
        expected = module.trainer.accumulate_grad_batches
        if 0 < self._micro_batches < expected:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(expected / self._micro_batches)

    def _end_step(self) -> None:
        self._micro_batches = 0
        self._is_complete = False

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Around a backward that no optimizer step follows."""
        assert self.engine is not None
        with self.engine.no_sync():
            yield

    # ------------------------------------------------------------- checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state of the model, whole, in host memory."""
        state: dict[str, Any] = fetched(super().lightning_module_state_dict())
        return state

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer, of whole parameters, in host memory."""
        state: dict[str, Any] = fetched(unwrap(optimizer).state_dict())
        return state

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        self._continuation.add_to(checkpoint)
        # Callbacks keep what they have monitored, on the devices.
        write = partial(super().save_checkpoint, fetched(checkpoint), filepath, storage_options)  # on host 0
        hosts().unanimous("saving a checkpoint", write)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint: a file, or a directory that another strategy of this package has saved."""
        read_file = partial(super().load_checkpoint, checkpoint_path, weights_only)
        checkpoint = read(checkpoint_path, self.checkpoint_io, read_file, weights_only)
        require_lightning(checkpoint, checkpoint_path)
        found = {key: value if key in LEFT_IN_FILE else in_memory(value) for key, value in checkpoint.items()}
        if "callbacks" in found:
            found["callbacks"] = with_scores_on(self.root_device, found["callbacks"])
        return found

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        if self.engine is not None and not self.engine.is_closed:
            self.engine.settle()

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"Expected a checkpoint with the state of {len(self.optimizers)} optimizers, got that of {len(states)}."
                " It was made with another configure_optimizers."
            )
        assert self.engine is not None
        for optimizer, state in zip(self.optimizers, states, strict=True):
            self.engine.load_optimizer_state(unwrap(optimizer), in_memory(state))

    # --------------------------------------------------------------------- end

    @override
    def teardown(self) -> None:
        if self._among_hosts is not None:
            self._among_hosts.end()
            self._among_hosts = None
        self._continuation.end()
        if self.engine is not None and not self.engine.is_closed:
            self.engine.bring_home()
        self._scale_for()
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        if cls.strategy_name not in strategy_registry:
            strategy_registry.register(cls.strategy_name, cls, description=f"{cls.__name__}, row fsdp, one process")
