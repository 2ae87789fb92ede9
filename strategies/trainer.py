"""What the Trainer's accel strategies have in common: Lightning's names for what the engine does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import _StrategyRegistry
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.core import Engine, GradScaler, PowerSGD, Rest
from lightning_accel.core.agreement import synchronise
from lightning_accel.core.dtypes import Dtypes
from lightning_accel.core.materialise import InitFn, has_meta
from lightning_accel.core.offload import OffloadKind, require_offload
from lightning_accel.core.partition import Units
from lightning_accel.core.placement import Row
from lightning_accel.core.registry import engines_of
from lightning_accel.plugins.precision import require_known_scaler
from lightning_accel.strategies.accumulation import Accumulation
from lightning_accel.strategies.averaging import require_averaging_in_parts
from lightning_accel.strategies.checkpoints import Checkpoints, StateDictType
from lightning_accel.strategies.evenness import adopt, require_even
from lightning_accel.strategies.failure import explain
from lightning_accel.strategies.launched import evaluate_writably, register_each
from lightning_accel.strategies.options import EngineOptions, Recomputed, reject_unknown, to_device
from lightning_accel.strategies.resume import Continuation
from lightning_accel.strategies.saving import SavingStrategy, unwrap
from lightning_accel.strategies.schedule import hold_schedules
from lightning_accel.strategies.signals import AgreedSignals


class AccelStrategy(SavingStrategy):
    """Base of the Trainer strategies.

    Args:
        row: The placement row.
        accelerator: As for Lightning's strategies, likewise the next four.
        parallel_devices: The devices of this node.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: Reads and writes checkpoint files.
        precision_plugin: The precision.
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
        loss_weight: Says of a training batch how many tokens or samples its loss is the mean of. Ranks and accumulated
            micro-batches then count by it instead of each the same; see ``Engine.set_loss_weight``, which may be called
            in ``training_step`` instead (``self.trainer.strategy.engine``).
        state_dict_type: ``"sharded"``: checkpoints are directories, to which every rank writes its part; the default
            for rows that shard optimizer state (unless there is a ``checkpoint_io``). ``"full"``: one file, as
            Lightning's, which rank 0 writes. Either kind loads under every row and number of ranks.
        async_save: Write sharded checkpoints while training goes on. What goes wrong is raised at the next step or at
            the end.
        process_group_backend: ``"gloo"``, ``"nccl"``, …; by default what suits the device.
        timeout: Longest wait for a collective.
        start_method: How the ranks of this node are started: ``"popen"``, ``"spawn"`` or ``"fork"``.
        unknown: Options that do not exist; refused.

    """

    engine: Engine | None
    """The engine of the current or last fit; None before. In other stages, only of parameters that rest sharded.

    At the end of a stage it gives the model back with all of its values and is closed. If the model came without values
    (on the meta device), and these rest sharded, they stay so and the engine open: the next stage goes on with it. A
    model that was changed meanwhile, or comes to another strategy of this package, is made whole first; to have that
    for any other use call ``close()`` on every rank."""

    def __init__(
        self,
        row: Row,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
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
        loss_weight: Callable[[Any], float | Tensor] | None = None,
        state_dict_type: StateDictType | None = None,
        async_save: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork"] = "popen",
        **unknown: Any,
    ) -> None:
        reject_unknown(type(self), unknown)
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
        self._loss_weight = loss_weight
        self._weight_of_batch: float | Tensor | None = None
        self._accumulation = Accumulation()
        self._step_was_skipped = False
        self._continuation = Continuation(self)
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
        self.engine = None
        self._signals: AgreedSignals | None = None
        self._was_set_up = False  # in this stage
        self._awaited: tuple[dict[str, Any], bool] | None = None  # values for a model that is on the meta device still

    # ---------------------------------------------------------------- plugins

    @property
    @override
    def precision_plugin(self) -> Precision:
        """The precision plugin, which clips and scales through the engine."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if precision_plugin is not None:
            chosen = self._choose_precision(precision_plugin)
            precision_plugin = self._options.adopt(
                chosen, self.row, self._given_scaler, self.accelerator, self._start_method
            )
        self._precision_plugin = precision_plugin

    def _choose_precision(self, plugin: Precision) -> Precision:
        """The plugin to use instead of the Trainer's, or that one itself."""
        return plugin

    @property
    def grad_scaler(self) -> GradScaler | None:
        """The gradient scaler in use, if any."""
        scaler = getattr(self.precision_plugin, "scaler", None)
        return scaler if isinstance(scaler, GradScaler) else None

    # ------------------------------------------------------------------ set-up

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Within it, tensors are made on the device; with ``empty_init`` on the meta device, which takes no memory."""
        if empty_init:
            with torch.device("meta"), self.precision_plugin.tensor_init_context():
                yield
        else:
            with super().tensor_init_context(empty_init):
                yield

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        to_device(self.model, self.root_device)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._continuation.take_up(trainer)
        if fitting and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        evaluate_writably(trainer)
        self._failed = False
        self._was_set_up = True
        if not self._goes_on(fitting):
            for former in self._open_engines():
                former.close()
            self.engine = None
            self.model = self.precision_plugin.convert_module(self.model)
            self.model_to_device()
        if fitting:
            _require_clipping(trainer.gradient_clip_val)
            if self.row.gradients is Rest.SHARDED:
                require_known_scaler(self.precision_plugin, self.row.name)
            if self.engine is None:
                self.engine = self._options.start(self.model, self.row, self.root_device, self.precision_plugin)
            self._step_was_skipped = False
            self._accumulation.end()
            self._signals = AgreedSignals(trainer, self.root_device)
            self._at_teardown.callback(self._signals.remove)
            self._at_teardown.callback(hold_schedules(trainer, lambda: self._step_was_skipped))
            self.setup_optimizers(trainer)
            for optimizer in map(unwrap, self.optimizers):
                if not isinstance(optimizer, _MockOptimizer):
                    self.engine.add_optimizer(optimizer)
            self.engine.build()
            require_averaging_in_parts(trainer.callbacks, self.engine)  # type: ignore[attr-defined]
        elif self.engine is not None:
            self.engine.build()
        elif has_meta(self.model) or self._options.always(self.row, self.precision_plugin):
            self.engine = self._options.start(self.model, self.row, self.root_device, self.precision_plugin)
            self.engine.build()
        else:
            synchronise(self.model)
        if self._awaited is not None:
            self.load_model_state_dict(*self._awaited)
            self._awaited = None
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _goes_on(self, fitting: bool) -> bool:
        """Whether the last stage has left this very model in parts, as this one wants it."""
        if self.engine is None or self.engine.is_closed or self.engine.module is not self.model:
            return False
        if fitting and self._layer_sync:
            return False  # it has replaced layers
        return self.engine.names == {parameter: name for name, parameter in self.model.named_parameters()}

    @property
    def _leaves_in_parts(self) -> bool:
        """Whether the model stays as it rests at the end of a stage, because it may be too large for one rank."""
        return (
            self.engine is not None
            and self.engine.is_usable
            and not self._failed
            and self.engine.began_without_values
            and self.engine.is_fetched_from
            and not isinstance(self._launcher, _MultiProcessingLauncher)  # these processes end now
        )

    @override
    def process_dataloader(self, dataloader: object) -> object:
        adopt(dataloader, self.engine)
        return self._continuation.follow(dataloader)

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        require_even(self.lightning_module.trainer)
        self._continuation.start()

    # ------------------------------------------------------------------- steps

    def _forward(self) -> AbstractContextManager[None]:
        return nullcontext() if self.engine is None else self.engine.forward_context()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if self.world_size == 1 and self._signals is not None:
            # Where there are several ranks, Lightning has it called before it counts the batch.
            self._signals.act(self._signals.batches_before_this)
        if self._loss_weight is not None:
            self._weight_of_batch = self._loss_weight(args[0])
        with self._forward():
            return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self._forward():
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self._forward():
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._forward():
            return super().predict_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None
        assert self.engine is not None, "backward outside of fit"
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        if self._weight_of_batch is not None and self.engine.loss_weight is None:
            self.engine.set_loss_weight(self._weight_of_batch)
        loss = self._accumulation.weigh(closure_loss, self.engine, self.lightning_module)
        # Gradients are reduced when this is left: ``on_after_backward`` sees them as they will be stepped with.
        with self.engine.backward_context():
            self.precision_plugin.backward(loss, self.lightning_module, optimizer, *args, **kwargs)
        if self.engine.is_boundary:
            self._accumulation.complete(self.engine, self.lightning_module)
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        self._checkpoints.check()
        scaler = self.grad_scaler
        before = 0 if scaler is None else scaler.skipped_steps

        def complete() -> Any:
            result = closure()
            assert self.engine is not None
            assert self.lightning_module is not None
            self._accumulation.complete(self.engine, self.lightning_module)  # if the last micro-batch had no loss
            return result

        result = super().optimizer_step(optimizer, complete, *args, **kwargs)
        self._accumulation.end()
        self._step_was_skipped = scaler is not None and scaler.skipped_steps > before
        return result

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Within it, rows whose gradients accumulate on each rank send nothing."""
        if self.engine is None:
            yield
        else:
            with self.engine.no_sync():
                yield

    # --------------------------------------------------------------------- end

    @override
    def on_exception(self, exception: BaseException) -> None:
        explain(exception)
        if not isinstance(exception, KeyboardInterrupt):
            self._end_soon()

    @override
    def teardown(self) -> None:
        try:
            self._checkpoints.finish()
        except Exception:
            if not self._failed:  # else that error is the one to show
                raise
        finally:
            self._tear_down()

    def _tear_down(self) -> None:
        self._at_teardown.close()
        self._continuation.end()
        # What an earlier stage has left in parts stays so if this one has failed before it had to do with it.
        if self.engine is not None and self._was_set_up:
            if self._leaves_in_parts:
                self.engine.dismiss_optimizers()
            else:
                # After a failure nobody may answer any more.
                self.engine.close(abandon=self._failed)
        restore = getattr(self.precision_plugin, "restore_module", None)
        if restore is not None and self._was_set_up and not self._failed and not self._leaves_in_parts:
            restore(self.model)
        self._was_set_up = False
        module = self._lightning_module
        if module is not None and (engines_of(module) or has_meta(module)):
            # Lightning would move the module to the CPU: there is nothing to move, or (if setting up has failed) that
            # error would hide the cause.
            if self._layer_sync and module._trainer is not None and module._trainer.state.fn == TrainerFn.FITTING:
                self.model = self._layer_sync.revert(module)
            self._lightning_module = None
        super().teardown()
        self._lightning_module = module
        self._awaited = None  # if setting up has failed: it is not for the next model

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for row, arguments in cls.registered().items():
            register_each(strategy_registry, cls, f"accel_{row}", f"row {row}", **arguments)

    @classmethod
    def registered(cls) -> dict[str, dict[str, Any]]:
        """Rows that the class stands for, with the arguments that choose them."""
        return {}


def _require_clipping(limit: float | None) -> None:
    if limit is not None and not limit >= 0:  # NaN is not, either
        raise ValueError(f"Expected gradient_clip_val to be positive, or None or 0 for no clipping, got {limit}.")
