"""accel_deepspeed: DeepSpeed's own engine for the Trainer, on CUDA and on the CPU.

[Note: whose work it is]
DeepSpeed shards, reduces, scales losses, clips, steps and writes checkpoints. Lightning loops, counts micro-batches,
divides losses by ``accumulate_grad_batches`` and steps schedules. Every stage begins and ends with a whole model, as
with the other strategies of this package; an engine lives as long as one ``fit``.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.accelerators import CPUAccelerator as FabricCPUAccelerator
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import _StrategyRegistry
from lightning.fabric.utilities.types import _PATH, ReduceOp
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import LBFGS
from typing_extensions import override

from lightning_accel.convert.deepspeed import open_deepspeed
from lightning_accel.convert.deepspeed_files import find_deepspeed, read_deepspeed
from lightning_accel.core.agreement import synchronise
from lightning_accel.strategies.deepspeed_file import DeepSpeedFile, samples_of_batch
from lightning_accel.strategies.deepspeed_installed import import_deepspeed, require_deepspeed
from lightning_accel.strategies.deepspeed_model import LentModel
from lightning_accel.strategies.deepspeed_precision import EnginePrecision
from lightning_accel.strategies.deepspeed_told import EngineFile
from lightning_accel.strategies.evenness import require_even
from lightning_accel.strategies.failure import explain
from lightning_accel.strategies.files import in_memory
from lightning_accel.strategies.options import reject_unknown
from lightning_accel.strategies.progress import Position, begin_epoch
from lightning_accel.strategies.schedule import hold_schedules
from lightning_accel.strategies.trainer import START_METHODS, fractional

_TAG = "checkpoint"
"""The folder in a checkpoint's folder; the name that Lightning's own DeepSpeed strategy uses."""
_SAVED_BY_DEEPSPEED = ("state_dict", "optimizer_states")


class AccelDeepSpeedStrategy(DDPStrategy):
    """DeepSpeed's own engine, ZeRO stages 0 to 3, behind the Trainer.

    For what only DeepSpeed has. A DeepSpeed file also configures this package's engine, which needs no DeepSpeed:
    :class:`~lightning_accel.strategies.zero.AccelZeROStrategy`.

    Args:
        stage: The ZeRO stage, 0 to 3. Default: 2, or what ``config`` says.
        config: A DeepSpeed JSON file, or a dict of what would be in it. DeepSpeed gets all of it, with what is
            ``"auto"`` filled from the Trainer, the model and the optimizer. What it says about precision, accumulation
            and clipping must agree with the Trainer's arguments, unless these are the defaults.
        accelerator: As for Lightning's strategies, likewise the next five.
        parallel_devices: The devices of this node.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: Reads checkpoint files that are not DeepSpeed's, for evaluation.
        precision_plugin: The precision: one of Lightning's plugins for 32-true, bf16-true, bf16-mixed and 16-mixed.
        process_group_backend: ``"gloo"``, ``"nccl"``, …; by default what suits the device.
        timeout: Longest wait for a collective.
        start_method: How the ranks of this node are started: ``"popen"``, ``"spawn"`` or ``"fork"``.
        unknown: Options that do not exist; refused.

    Raises:
        ModuleNotFoundError: If DeepSpeed is not installed, or too old.
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read or contradicts ``stage``.

    """

    strategy_name = "accel_deepspeed"
    engine: Any
    """DeepSpeed's engine during ``fit``, else None."""
    clipping: float
    """The largest norm of gradients that DeepSpeed was told; 0: they are not clipped."""

    def __init__(
        self,
        stage: int | None = None,
        config: DeepSpeedFile | None = None,
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
        require_deepspeed()
        reject_unknown(type(self), unknown)
        if start_method not in START_METHODS.values():
            raise ValueError(f"Expected start_method to be 'popen', 'spawn' or 'fork', got {start_method!r}.")
        self._file = EngineFile(config, stage)
        self.stage = self._file.stage
        self.engine = None
        self.clipping = 0.0
        self._lent: LentModel | None = None
        self._failed = False
        self._backwards = 0  # since the last step
        self._step_was_skipped = False
        self._continues_from: Path | None = None
        self._position: Position | None = None
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
    def precision_plugin(self) -> Precision:
        """What DeepSpeed leaves to do; made from the plugin that the Trainer chose."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if precision_plugin is not None and not isinstance(precision_plugin, EnginePrecision):
            name, autocasts = self._file.computes_in(precision_plugin)
            if name == "16-mixed" and isinstance(self.accelerator, (CPUAccelerator, FabricCPUAccelerator)):
                raise ValueError(
                    "Expected precision='bf16-mixed' or '32-true' on the CPU with strategy='accel_deepspeed', got"
                    " fp16, which DeepSpeed has for CUDA only. strategy='accel_zero2' has it on the CPU, too."
                )
            precision_plugin = EnginePrecision(name, autocasts, self)
        self._precision_plugin = precision_plugin

    # ------------------------------------------------------------------ set-up

    @override
    def setup_distributed(self) -> None:
        super().setup_distributed()
        if "LOCAL_RANK" not in os.environ:  # which DeepSpeed reads; a main process that starts the others has none
            os.environ["LOCAL_RANK"] = str(self.local_rank)
            self._at_teardown.callback(os.environ.pop, "LOCAL_RANK", None)
        deepspeed = import_deepspeed(self.root_device)
        timeout = self._timeout or default_pg_timeout
        deepspeed.init_distributed(
            self._process_group_backend, auto_mpi_discovery=False, verbose=False, timeout=timeout
        )

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        # Inference tensors cannot be written to later: parameters that are gathered in evaluation are.
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False
        trainer.predict_loop.inference_mode = False
        self._failed = False
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        synchronise(self.model)
        if fitting:
            self._require_trainable(trainer)
            self._file.steer(trainer, self.world_size)
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()  # which wraps optimizers anew
        for wrapper in self._lightning_optimizers:
            wrapper.zero_grad = self._zero_grad  # type: ignore[attr-defined]

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Make the optimizer and its schedule, and have DeepSpeed's engine take the model and both over."""
        module = self.lightning_module
        assert module is not None
        assert isinstance(self.precision_plugin, EnginePrecision)
        with self._file.configuring(module):
            super().setup_optimizers(trainer)
        if len(self.optimizers) != 1:
            raise ValueError(
                f"Expected one optimizer with strategy='accel_deepspeed', got {len(self.optimizers)}: DeepSpeed's"
                " engine has one. Give one optimizer several parameter groups, or use strategy='accel_zero2'."
            )
        (given,) = self.optimizers
        if isinstance(given, LBFGS):
            raise ValueError("Expected an optimizer that steps once with strategy='accel_deepspeed', got LBFGS.")
        told = self._file.told(trainer, self.world_size, module, self.precision_plugin.precision)
        self.clipping = told["gradient_clipping"]
        if is_files := isinstance(given, _MockOptimizer):
            told["optimizer"] = self._file.optimizer_section()
        self._lent = LentModel(module)
        self.engine, *_ = import_deepspeed(self.root_device).initialize(
            args=None if self.root_device.index is None else argparse.Namespace(device_rank=self.root_device.index),
            model=self.model,
            model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
            optimizer=None if is_files else given,
            config=told,
            dist_init_required=False,
        )
        self.model = self.engine
        optimizer = self.engine.basic_optimizer
        self.optimizers = [optimizer]
        if is_files:
            self.lr_scheduler_configs = self._file.schedule(optimizer, module)
        self._backwards = 0
        self._step_was_skipped = False
        self._at_teardown.callback(hold_schedules(trainer, lambda: self._step_was_skipped))
        if self._continues_from is not None:
            self._continue(self._continues_from)

    def _require_trainable(self, trainer: pl.Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        for hook, instead in (
            ("backward", "DeepSpeed's engine runs it"),
            ("configure_gradient_clipping", "DeepSpeed's step clips: say Trainer(gradient_clip_val=...)"),
        ):
            if is_overridden(hook, module, pl.LightningModule):
                raise ValueError(
                    f"Expected a LightningModule without a {hook} of its own with strategy='accel_deepspeed', got"
                    f" {type(module).__name__}.{hook}: {instead}."
                )
        wide = [name for name, parameter in module.named_parameters() if parameter.dtype is torch.float64]
        if wide:
            raise ValueError(
                f"Expected parameters of at most 32 bits with strategy='accel_deepspeed', got float64 ({wide[0]}): its"
                " master values are fp32. Use strategy='accel_zero2'."
            )

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        require_even(trainer)
        self._file.require_batches(trainer, self.world_size)
        if self._position is not None and self._position.begins:
            begin_epoch(trainer, self._position)
        size = samples_of_batch(trainer)
        if size is not None:
            self.engine.set_train_micro_batch_size(size)

    # ------------------------------------------------------------------- steps

    def add_gradients(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run DeepSpeed's backward: gradients are added to those since the last step."""
        assert self.engine is not None, "backward outside of fit"
        self._backwards += 1
        self.engine.backward(loss, *args, scale_wrt_gas=False, **kwargs)

    def step_engine(self, **kwargs: Any) -> None:
        """Run DeepSpeed's step, if there are gradients: it reduces what is left to, clips and updates."""
        if not self._backwards:
            return
        self.engine.step(**kwargs)
        self._backwards = 0
        self._step_was_skipped = not self.engine.was_step_applied()

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """DeepSpeed's step has done it, and what was added since cannot be taken back."""
        if self._backwards:
            raise RuntimeError(
                "Expected optimizer.zero_grad() before backward with strategy='accel_deepspeed', got it after"
                f" {self._backwards}: DeepSpeed's engine has taken these gradients, and drops them in step() only."
            )

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """DeepSpeed decides what is sent when; before a step there is nothing to block."""
        yield

    @override
    def reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        """Reduce a tensor over ranks; the mean of integers is a fraction."""
        return super().reduce(fractional(tensor, reduce_op), group, reduce_op)

    # ------------------------------------------------------------- checkpoints

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        """DeepSpeed does it."""
        return False

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: DeepSpeed writes it."""
        return {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write a directory as DeepSpeed does, with the Trainer's state in it. All ranks take part.

        Raises:
            ValueError: If there is no engine any more, the path is not a local one, or only weights were asked for.

        """
        filepath = str(self.broadcast(filepath))
        if self.engine is None:
            raise ValueError(
                "Expected save_checkpoint during fit with strategy='accel_deepspeed', got it outside: DeepSpeed's"
                " engine is gone. Use ModelCheckpoint, or call it in on_train_end."
            )
        if storage_options is not None or "://" in filepath:
            raise ValueError(f"Expected a local path, to which DeepSpeed writes, got {filepath} and {storage_options}.")
        if "optimizer_states" not in checkpoint:
            raise ValueError(
                "Expected save_weights_only=False with strategy='accel_deepspeed': DeepSpeed writes all of its state."
                " `accel convert` makes a file of weights from it."
            )
        rest = {key: value for key, value in checkpoint.items() if key not in _SAVED_BY_DEEPSPEED}
        unfinished = f"{filepath}.unfinished"
        if self.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.barrier()
        self.engine.save_checkpoint(unfinished, tag=_TAG, client_state=rest)
        self.barrier()
        if self.is_global_zero:
            if os.path.isdir(filepath):
                shutil.rmtree(filepath)
            os.replace(unfinished, filepath)
        self.barrier()

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint before the engine starts. For ``fit`` it must be one of DeepSpeed's.

        Raises:
            FileNotFoundError: If there is nothing.
            ValueError: If ``fit`` cannot continue from it.

        """
        assert self.lightning_module is not None
        path = Path(checkpoint_path)
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        folder = find_deepspeed(path)
        if folder is None and fitting:
            if not path.exists():
                raise FileNotFoundError(f"Expected a checkpoint at {path}, found nothing.")
            raise ValueError(
                f"Expected a checkpoint of DeepSpeed's to continue from with strategy='accel_deepspeed', got {path}. To"
                " start from its weights, give fit() a model made by load_from_checkpoint; to continue from it, use"
                " strategy='accel_zero2'."
            )
        if folder is None:
            return super().load_checkpoint(checkpoint_path, weights_only)
        checkpoint = open_deepspeed(folder, weights_only=weights_only is not False).nest
        if fitting:
            self._require_same_layout(folder, weights_only is not False)
            self._continues_from = folder
            if "loops" in checkpoint:  # else the script of somebody else has written it
                loops = checkpoint["loops"]["fit_loop"]
                self._position = Position.of(loops)
                if self._position.begins:  # see [Note: Lightning's restarts]
                    self._position.write(loops)
        return checkpoint

    def _require_same_layout(self, folder: Path, weights_only: bool) -> None:
        files = read_deepspeed(folder, weights_only=weights_only)
        written = files.model.get("ds_config") or {}
        stage = (written.get("zero_optimization") or {}).get("stage", 0)
        ranks = int(files.model.get("dp_world_size") or self.world_size)
        if (stage, ranks) != (self.stage, self.world_size):
            raise ValueError(
                f"Expected a checkpoint of stage {self.stage} on {self.world_size} ranks, got {folder} of stage {stage}"
                f" on {ranks}: DeepSpeed continues where nothing has changed. `accel convert` makes one of it that"
                " strategy='accel_zero2' continues from anywhere."
            )

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._continues_from is None:  # else DeepSpeed loads
            assert self.lightning_module is not None
            self.lightning_module.load_state_dict(in_memory(checkpoint["state_dict"]), strict=strict)

    def _continue(self, folder: Path) -> None:
        assert self.lightning_module is not None
        found, _ = self.engine.load_checkpoint(
            str(folder.parent),
            tag=folder.name,
            load_module_strict=self.lightning_module.strict_loading,
            load_lr_scheduler_states=False,
        )
        if found is None:
            raise ValueError(f"Expected {folder} to be a checkpoint that DeepSpeed can load, but it cannot.")

    # --------------------------------------------------------------------- end

    @override
    def on_exception(self, exception: BaseException) -> None:
        explain(exception)
        self._failed = self._failed or not isinstance(exception, KeyboardInterrupt)

    @override
    def teardown(self) -> None:
        self._at_teardown.close()
        self._continues_from = self._position = None
        if self.engine is not None:
            assert self._lent is not None
            self._lent.take_back(self.engine, abandon=self._failed)
            self.engine, self.model = None, self._lightning_module
        self._lent = None
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for suffix, start_method in START_METHODS.items():
            name = f"{cls.strategy_name}{suffix}"
            if name not in strategy_registry:
                strategy_registry.register(
                    name,
                    cls,
                    description=f"{cls.__name__}, DeepSpeed's own engine, ranks started by {start_method}",
                    start_method=start_method,
                )
