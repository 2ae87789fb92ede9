"""The same strategies for Lightning Fabric."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import _StrategyRegistry
from lightning.fabric.utilities.types import ReduceOp
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.core import Engine, GradScaler, PowerSGD, Rest
from lightning_accel.core.dtypes import Dtypes
from lightning_accel.core.materialise import InitFn
from lightning_accel.core.offload import OffloadKind, require_offload
from lightning_accel.core.partition import Units
from lightning_accel.core.placement import Row, find_row
from lightning_accel.plugins.accel_precision import AccelPrecision
from lightning_accel.plugins.precision import engine_optimizer, require_known_scaler
from lightning_accel.strategies.checkpoints import Checkpoints, StateDictType
from lightning_accel.strategies.deepspeed_file import DeepSpeedFile, FromFile
from lightning_accel.strategies.engine_module import EngineModule, EngineSyncControl, without_module
from lightning_accel.strategies.fabric_deepspeed import AccelDeepSpeedStrategy
from lightning_accel.strategies.fabric_saving import SavingFabricStrategy
from lightning_accel.strategies.fsdp import SHARDINGS, row_of_sharding
from lightning_accel.strategies.launched import fractional, register_each, require_start_method
from lightning_accel.strategies.options import EngineOptions, Recomputed, reject_unknown, to_device
from lightning_accel.strategies.xla_fabric import AccelXLAStrategy
from lightning_accel.strategies.zero import STAGES, row_of_stage

__all__ = [
    "AccelDDPStrategy",
    "AccelDeepSpeedStrategy",
    "AccelFSDPStrategy",
    "AccelXLAStrategy",
    "AccelZeROStrategy",
    "EngineModule",
]


class AccelFabricStrategy(SavingFabricStrategy):
    """Base of the Fabric strategies. It derives from Fabric's ``DDPStrategy`` for launching and process groups.

    Args:
        row: The placement row.
        accelerator: As for Fabric's strategies, likewise the next four.
        parallel_devices: The devices of this node.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: Reads and writes checkpoint files.
        precision: The precision.
        units: Names or classes of modules whose parameters are reduced and gathered together. Default: the members of
            the model's repeated block class.
        bucket_cap_mb: Neighbouring units are joined up to this size, in MiB.
        compile: Compile each unit's module: True, or keyword arguments for ``torch.compile``.
        param_init_fn: Sets, in place, the values of models that are made on the meta device (``configure_model``,
            ``init_module(empty_init=True)``). It is called with each module that has parameters or buffers of its own;
            by default its ``reset_parameters`` is.
        offload: ``"optimizer"``: keep optimizer state in host memory and run the step there. ``"parameters"`` (if they
            rest sharded): keep this rank's part of them there, too.
        offload_dir: A folder for files that optimizer state is kept in, instead of memory.
        activation_checkpointing: Compute activations again in backward instead of keeping them: True for each unit's
            module, or names or classes of modules. Names in ``state_dict`` stay as they are.
        activation_checkpointing_options: Keyword arguments for ``torch.utils.checkpoint.checkpoint``, such as
            ``preserve_rng_state``, ``context_fn`` (for a selective policy) or ``use_reentrant`` (default: False).
        grad_scaler: Scales losses under ``precision="16-mixed"``, instead of one with torch's defaults; under
            ``"bf16-mixed"`` it skips steps whose gradients are not finite (``GradScaler("static", init_scale=1.0)``).
        param_dtype: What forward and backward compute with instead of wider parameters of two or more dimensions, and
            what is gathered, while the optimizer updates the values as they came; for rows that shard optimizer state.
            By default fp16 or bf16 under mixed precision; ``torch.float32`` leaves rounding to autocast.
        reduce_dtype: What gradients travel in; by default what they are computed in, or rest in for rows that add them
            up on each rank (``ddp`` and ``zero1``: fp32). ``torch.bfloat16`` or ``torch.float16`` halves those bytes.
        gradient_compression: For ``ddp``: :class:`~lightning_accel.core.PowerSGD` has matrices of gradients travel as
            products of thin ones. Not together with ``reduce_dtype``. What it keeps is in no checkpoint.
        state_dict_type: ``"sharded"``: ``fabric.save`` makes a directory, to which every rank writes its part; the
            default for rows that shard optimizer state (unless there is a ``checkpoint_io``). ``"full"``: one file,
            which rank 0 writes. Either kind loads under every row and number of ranks.
        async_save: Write sharded checkpoints while training goes on. What goes wrong is raised at the next backward or
            save, at ``strategy.teardown()``, or at exit.
        process_group_backend: ``"gloo"``, ``"nccl"``, …; by default what suits the device.
        timeout: Longest wait for a collective.
        start_method: How the ranks of this node are started: ``"popen"``, ``"spawn"`` or ``"fork"``.
        unknown: Options that do not exist; refused.

    """

    def __init__(
        self,
        row: Row,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        units: Units | None = None,
        bucket_cap_mb: float = 25.0,
        compile: bool | Mapping[str, Any] = False,
        param_init_fn: InitFn | None = None,
        offload: OffloadKind | None = None,
        offload_dir: str | Path | None = None,
        activation_checkpointing: Recomputed = False,
        activation_checkpointing_options: Mapping[str, Any] | None = None,
        grad_scaler: GradScaler | None = None,
        param_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        gradient_compression: PowerSGD | None = None,
        state_dict_type: StateDictType | None = None,
        async_save: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork"] = "popen",
        **unknown: Any,
    ) -> None:
        reject_unknown(type(self), unknown)
        require_start_method(start_method)
        require_offload(offload, row)
        Dtypes.checked(param_dtype, reduce_dtype, row)
        if gradient_compression is not None:
            gradient_compression.require_suitable(row, reduce_dtype)
        self.row = row
        self._options = EngineOptions(
            units=units,
            bucket_cap_mb=bucket_cap_mb,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
            activation_checkpointing_options=activation_checkpointing_options,
            param_init_fn=param_init_fn,
            offload=offload,
            offload_dir=offload_dir,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            gradient_compression=gradient_compression,
        )
        self._checkpoints = Checkpoints(row, state_dict_type, async_save)
        self._checkpoints.use(checkpoint_io)
        self._start_method = start_method  # also Lightning's name, which it sets too late for plugins
        self._given_scaler = grad_scaler
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision=precision,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._backward_sync_control = EngineSyncControl()
        self._engines: list[weakref.ref[Engine]] = []

    @property
    def engines(self) -> list[Engine]:
        """One for each module that was set up and is still in use."""
        found = (reference() for reference in self._engines)
        return [engine for engine in found if engine is not None and not engine.is_closed]

    def _engines_of_all_ranks(self) -> list[Engine]:
        """The engines that every rank still has: when unused ones are collected may differ between ranks."""
        found = [reference() for reference in self._engines]
        alive = [engine is not None and not engine.is_closed for engine in found]
        if len(found) > 1 and self.world_size > 1:
            flags = torch.tensor(alive, dtype=torch.int32, device=self.root_device)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MIN)
            alive = [bool(flag) for flag in flags.tolist()]
        self._engines = [reference for reference, flag in zip(self._engines, alive, strict=True) if flag]
        return [engine for engine, flag in zip(found, alive, strict=True) if flag and engine is not None]

    @property
    @override
    def precision(self) -> Precision:
        """The precision plugin, which scales through the engine."""
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if precision is not None:
            precision = self._choose_precision(precision)
            if isinstance(precision, AccelPrecision):
                precision = precision.in_fabric()
            precision = self._options.adopt(
                precision, self.row, self._given_scaler, self.accelerator, self._start_method
            )
        self._precision = precision

    def _choose_precision(self, precision: Precision) -> Precision:
        """The plugin to use instead of Fabric's, or that one itself."""
        return precision

    @property
    def grad_scaler(self) -> GradScaler | None:
        """The gradient scaler in use, if any."""
        scaler = getattr(self.precision, "scaler", None)
        return scaler if isinstance(scaler, GradScaler) else None

    # ------------------------------------------------------------------ set-up

    @override
    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Within it, modules are made on the device; with ``empty_init`` on the meta device, which takes no memory."""
        if not empty_init:
            return super().module_init_context(empty_init)
        stack = ExitStack()
        stack.enter_context(torch.device("meta"))
        stack.enter_context(self.precision.module_init_context())
        return stack

    @override
    def module_to_device(self, module: nn.Module) -> None:
        to_device(module, self.root_device)

    @override
    def setup_module(self, module: nn.Module) -> EngineModule:  # type: ignore[override]
        """Start an engine for a module. All ranks take part."""
        if self.row.gradients is Rest.SHARDED:
            require_known_scaler(self.precision, self.row.name)
        engine = self._options.start(module, self.row, self.root_device, self.precision)
        self._engines.append(weakref.ref(engine))
        return EngineModule(module, engine)

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Start an engine for a module and its optimizers."""
        wrapped = self.setup_module(module)
        for optimizer in optimizers:
            wrapped.engine.add_optimizer(optimizer)
        wrapped.engine.build()
        return wrapped, optimizers, scheduler

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Give an optimizer to the engine that has its parameters.

        Raises:
            ValueError: If no module that was set up has them.

        """
        first = next((p for group in optimizer.param_groups for p in group["params"]), None)
        for engine in self.engines:
            if first in engine.names:
                engine.add_optimizer(optimizer)
                engine.build()
                return optimizer
        raise without_module(optimizer, len(self.engines))

    # ------------------------------------------------------------------- steps

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward with the gradients of every module that was set up reduced as the row says."""
        self._checkpoints.check()
        engines = self._engines_of_all_ranks()
        tensor = _weigh(tensor, engines)
        self.precision.pre_backward(tensor, module)
        with ExitStack() as stack:
            for engine in engines:
                stack.enter_context(engine.backward_context())
            self.precision.backward(tensor, module, *args, **kwargs)
        self.precision.post_backward(tensor, module)

    @override
    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip by the global norm; returns it."""
        added = engine_optimizer(optimizer)
        if added is None:
            return super().clip_gradients_norm(module, optimizer, max_norm, norm_type, error_if_nonfinite)
        self.precision.unscale_gradients(added.optimizer)
        return added.engine.clip_grad_norm_(added.optimizer, max_norm, norm_type, error_if_nonfinite)

    @override
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float | int) -> None:
        """Clamp gradients to ``[-clip_val, clip_val]``."""
        added = engine_optimizer(optimizer)
        if added is None:
            super().clip_gradients_value(module, optimizer, clip_val)
            return
        self.precision.unscale_gradients(added.optimizer)
        added.engine.clip_grad_value_(added.optimizer, clip_val)

    @override
    def all_reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        """Reduce a tensor over ranks; the mean of integers is a fraction."""
        return super().all_reduce(fractional(tensor, reduce_op), group, reduce_op)

    # --------------------------------------------------------------------- end

    @override
    def teardown(self) -> None:
        """Finish saving and close the engines. Fabric itself never calls this; both is done at exit, too.

        Raises:
            Exception: What a save in the background has failed with.

        """
        try:
            self._checkpoints.finish()
        finally:
            self._close()

    def _close(self) -> None:
        for engine in self.engines:
            engine.close()
        self._engines.clear()
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for row, arguments in cls.registered().items():
            register_each(strategy_registry, cls, f"accel_{row}", f"row {row}", **arguments)

    @classmethod
    def registered(cls) -> dict[str, dict[str, Any]]:
        """Rows that the class stands for, with the arguments that choose them."""
        return {}


class AccelDDPStrategy(AccelFabricStrategy):
    """Data parallel; see :class:`lightning_accel.strategies.AccelDDPStrategy`.

    Args:
        kwargs: See :class:`AccelFabricStrategy`.

    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(find_row("ddp"), **kwargs)

    @classmethod
    @override
    def registered(cls) -> dict[str, dict[str, Any]]:
        return {"ddp": {}}


class AccelZeROStrategy(AccelFabricStrategy):
    """ZeRO stages 1, 2 and 3; see :class:`lightning_accel.strategies.AccelZeROStrategy`.

    Args:
        stage: 1, 2 or 3. Default: 2, or what ``config`` says.
        config: A DeepSpeed JSON file, or a dict of what would be in it: stage, offload, precision and loss scale. What
            is the loop's own business (accumulation, clipping, the optimizer) is left to it, with a warning.
        kwargs: See :class:`AccelFabricStrategy`.

    """

    def __init__(self, stage: int | None = None, config: DeepSpeedFile | None = None, **kwargs: Any) -> None:
        self._file = None if config is None else FromFile(config, stage, kwargs)
        self._was_told = False
        if self._file is None:
            self.stage = 2 if stage is None else stage
            super().__init__(row_of_stage(self.stage), **kwargs)
        else:
            self.stage = self._file.stage
            super().__init__(self._file.row, **self._file.arguments)
            self._options = self._file.lay_out(self._options, None)

    @property
    def has_file(self) -> bool:
        """Whether there is a ``config``."""
        return self._file is not None

    def take_file(self) -> FromFile | None:
        """What ``config`` says, for a loop that does its part of it: no warning says any more that it is left to it."""
        self._was_told = True
        return self._file

    @override
    def _choose_precision(self, precision: Precision) -> Precision:
        if self._file is None:
            return precision
        chosen, self._given_scaler = self._file.precision(precision)
        return chosen

    @override
    def setup_module(self, module: nn.Module) -> EngineModule:  # type: ignore[override]
        """Start an engine for a module. All ranks take part."""
        if self._file is not None:
            self._options = self._file.lay_out(self._options, module)
            if not self._was_told:
                self._file.leave_to_loop("the loop,", self.world_size)
                self._was_told = True
        wrapped = super().setup_module(module)
        if self._file is not None:
            self._file.watch(wrapped.engine)
        return wrapped

    @classmethod
    @override
    def registered(cls) -> dict[str, dict[str, Any]]:
        return {row: {"stage": stage} for stage, row in STAGES.items()}


class AccelFSDPStrategy(AccelFabricStrategy):
    """Fully sharded data parallel; see :class:`lightning_accel.strategies.AccelFSDPStrategy`.

    Args:
        sharding: ``"full"``, ``"partial"`` or ``"hybrid"``.
        shard_size: For ``"hybrid"``: how many neighbouring ranks divide a copy of the state.
        local_accumulation: Whether ``fabric.no_backward_sync`` keeps gradients whole on each rank.
        kwargs: See :class:`AccelFabricStrategy`.

    """

    def __init__(
        self,
        sharding: str = "full",
        shard_size: int | None = None,
        local_accumulation: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(row_of_sharding(sharding, shard_size, local_accumulation), **kwargs)
        self.sharding = sharding
        self._options = replace(self._options, shard_size=shard_size)

    @classmethod
    @override
    def registered(cls) -> dict[str, dict[str, Any]]:
        return {row: {"sharding": sharding} for sharding, row in SHARDINGS.items()}


def _weigh(loss: Tensor, engines: Sequence[Engine]) -> Tensor:
    """A loss times the weight that any engine was given for it; others that train are told."""
    weights = {engine.loss_weight for engine in engines} - {None}
    if len(weights) > 1:
        raise ValueError(f"Expected one weight for a loss, got {sorted(weights)} for several modules.")  # type: ignore[type-var]
    for weight in weights:
        assert weight is not None
        told = [engine for engine in engines if engine.optimizers or engine.loss_weight is not None]
        for engine in told:
            engine.set_loss_weight(weight)
        return told[0].weigh(loss)
    sharing = next((engine for engine in engines if engine.share is not None), None)
    return loss if sharing is None else sharing.weigh(loss)
