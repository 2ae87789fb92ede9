"""accel_deepspeed: DeepSpeed's own engine for the Trainer, on CUDA and on the CPU.

[Note: whose work it is]
DeepSpeed shards, reduces, scales losses, clips, steps and writes checkpoints. Lightning loops, counts micro-batches,
divides losses by ``accumulate_grad_batches`` and steps schedules. Every stage begins and ends with a whole model, as
with the other strategies of this package; an engine lives as long as one ``fit``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.strategies import _StrategyRegistry
from lightning.fabric.utilities.types import _PATH, ReduceOp
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from lightning_accel.convert.deepspeed import open_deepspeed
from lightning_accel.convert.deepspeed_files import find_deepspeed
from lightning_accel.core.agreement import synchronise
from lightning_accel.strategies.deepspeed_division import Division, divide_tensors
from lightning_accel.strategies.deepspeed_file import DeepSpeedFile, samples_of_batch
from lightning_accel.strategies.deepspeed_installed import (
    divided_as_made,
    join_process_group,
    local_rank_known,
    require_deepspeed,
    rests_in_parts,
)
from lightning_accel.strategies.deepspeed_model import joined_when_called
from lightning_accel.strategies.deepspeed_pipeline import PipelineRun, find_pipeline
from lightning_accel.strategies.deepspeed_precision import EnginePrecision
from lightning_accel.strategies.deepspeed_run import (
    RunningEngine,
    only_optimizer,
    read_divided,
    read_same_layout,
    require_local,
    require_trainable,
)
from lightning_accel.strategies.deepspeed_told import EngineFile
from lightning_accel.strategies.evenness import require_even
from lightning_accel.strategies.failure import explain
from lightning_accel.strategies.files import in_memory
from lightning_accel.strategies.launched import AccelLaunchedStrategy, evaluate_writably, register_each
from lightning_accel.strategies.progress import Position, begin_epoch
from lightning_accel.strategies.schedule import hold_schedules

_SAVED_BY_DEEPSPEED = ("state_dict", "optimizer_states")


class AccelDeepSpeedStrategy(AccelLaunchedStrategy):
    """DeepSpeed's own engine, ZeRO stages 0 to 3, behind the Trainer.

    For what only DeepSpeed has. A DeepSpeed file also configures this package's engine, which needs no DeepSpeed:
    :class:`~lightning_accel.strategies.zero.AccelZeROStrategy`.

    Args:
        stage: The ZeRO stage, 0 to 3. Default: 2, or what ``config`` says.
        config: A DeepSpeed JSON file, or a dict of what would be in it. DeepSpeed gets all of it, with what is
            ``"auto"`` filled from the Trainer, the model and the optimizer. What it says about precision, accumulation
            and clipping must agree with the Trainer's arguments, unless these are the defaults.
        kwargs: See :class:`~lightning_accel.strategies.launched.AccelLaunchedStrategy`: ``process_group_backend``,
            ``timeout``, ``start_method`` and Lightning's own. A ``precision_plugin`` is one of Lightning's for 32-true,
            bf16-true, bf16-mixed and 16-mixed; ``checkpoint_io`` reads files that are not DeepSpeed's, for evaluation.

    Raises:
        ModuleNotFoundError: If DeepSpeed is not installed, or too old.
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read or contradicts ``stage``.

    """

    strategy_name = "accel_deepspeed"

    def __init__(self, stage: int | None = None, config: DeepSpeedFile | None = None, **kwargs: Any) -> None:
        require_deepspeed()
        self._file = EngineFile(config, stage)
        self.stage = self._file.stage
        self._run: RunningEngine | None = None
        self._division: Division | None = None
        self._pipeline: Any = None
        self._micro_batches = 1  # of a pipeline's batch
        self._continues_from: Path | None = None
        self._position: Position | None = None
        super().__init__(**kwargs)

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine during ``fit``, else None."""
        return None if self._run is None else self._run.engine

    @property
    def run(self) -> RunningEngine:
        """What goes on in ``fit``."""
        assert self._run is not None, "outside of fit"
        return self._run

    @property
    @override
    def precision_plugin(self) -> Precision:
        """What DeepSpeed leaves to do; made from the plugin that the Trainer chose."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if precision_plugin is not None and not isinstance(precision_plugin, EnginePrecision):
            precision_plugin = EnginePrecision(*self._file.computes_in(precision_plugin, self.accelerator), self)
        self._precision_plugin = precision_plugin

    # ------------------------------------------------------------------ set-up

    @override
    def setup_distributed(self) -> None:
        super().setup_distributed()
        self._at_teardown.enter_context(local_rank_known(self.local_rank))
        join_process_group(self.root_device, self._process_group_backend, self._timeout)

    @contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        """What ``configure_model`` runs in: at stage 3 each rank makes its part of each parameter."""
        assert self.lightning_module is not None
        assert isinstance(self.precision_plugin, EnginePrecision)
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if not fitting or self.stage < 3 or self._file.tensor_parallel_size > 1:
            yield
            return
        with divided_as_made(self.root_device, self._file.told_before(self.precision_plugin.precision)):
            yield

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """In ``fit`` the ranks that share a replica of the model get the same samples."""
        return super().distributed_sampler_kwargs if self._division is None else self._division.sampler_kwargs

    @property
    def _replicas(self) -> int:
        return self.world_size if self._division is None else self._division.replicas

    @override
    def reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        """Reduce a tensor over ranks, over one of each replica of a divided model."""
        if group is None and self._division is not None:
            group = self._division.across
        return super().reduce(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks, or any, say yes."""
        said = torch.tensor(int(decision), device=self.root_device)
        count = int(self.reduce(said, group=dist.group.WORLD, reduce_op="sum"))
        return count == self.world_size if all else count > 0

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        assert trainer.state.fn is not None
        fitting = trainer.state.fn == TrainerFn.FITTING
        module = self.lightning_module
        assert module is not None
        if fitting and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        evaluate_writably(trainer)  # parameters that are gathered in evaluation are written to later
        self._failed = False
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if fitting:
            self._require_hooks()
            self._divide()
        elif find_pipeline(module, self.stage) is not None:
            raise ValueError(
                "Expected trainer.fit with a PipelineModule, whose validation_step evaluates, got"
                f" trainer.{trainer.state.fn.value}: outside of fit there is no engine, and each rank has a part of the"
                " layers."
            )
        is_in_parts = not fitting and rests_in_parts(module)
        if is_in_parts:
            assert isinstance(self.precision_plugin, EnginePrecision)
            told = self._file.told_before(self.precision_plugin.precision)
            self._at_teardown.enter_context(joined_when_called(module, told, self.root_device))
        elif self._pipeline is None:
            synchronise(self.model)  # the layers of a pipeline DeepSpeed sends to those that have the same
        if fitting:
            if self._pipeline is None:
                self._file.steer(trainer, self._replicas)
            else:
                self._micro_batches = self._file.steer_pipeline(trainer, self._replicas)
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()  # which wraps optimizers anew
        for wrapper in self._lightning_optimizers:
            wrapper.zero_grad = self._zero_grad  # type: ignore[attr-defined]

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Make the optimizer and its schedule, and have DeepSpeed's engine take the model and both over."""
        module = self.lightning_module
        assert module is not None
        assert self.model is not None
        assert isinstance(self.precision_plugin, EnginePrecision)
        with self._file.configuring(module):
            super().setup_optimizers(trainer)
        given = only_optimizer(self.optimizers)
        require_trainable(module, given)
        automatic = module.automatic_optimization
        told = self._file.told(
            self._replicas,
            module,
            self.precision_plugin.precision,
            accumulation=trainer.accumulate_grad_batches * self._micro_batches if automatic else 1,
            clipping=trainer.gradient_clip_val if automatic else self._file.clipping,
        )
        if is_files := isinstance(given, _MockOptimizer):
            told["optimizer"] = self._file.optimizer_section()
        optimizer = None if is_files else given
        if self._pipeline is not None:
            told.pop("managed_gradient_accumulation")  # it counts the micro-batches of a batch itself
            self._run = PipelineRun(self._pipeline, optimizer, told, self.root_device)
        else:
            self._run = RunningEngine(self.model, module, optimizer, told, self.root_device, self._division)
            self.model = self.run.engine
        self.optimizers = [self.run.optimizer]
        if is_files:
            self.lr_scheduler_configs = self._file.schedule(self.run.optimizer, module)
        self._at_teardown.callback(hold_schedules(trainer, lambda: self.run.step_was_skipped))
        if self._continues_from is not None:
            self.run.load(self._continues_from, strict=module.strict_loading)

    def _divide(self) -> None:
        """Find out which ranks share a replica of the model, if any do."""
        module = self.lightning_module
        assert module is not None
        if self._division is not None:
            return
        self._pipeline = find_pipeline(module, self.stage)
        size = self._file.tensor_parallel_size
        if self._pipeline is not None and size > 1:
            raise ValueError(
                f"Expected a PipelineModule or tensor_parallel.autotp_size, got both ({size}). Divide the pipeline's"
                " own layers, or leave it out."
            )
        if self._pipeline is not None:
            self._division = Division(self._pipeline.mpu())
        elif size > 1:
            self._division = divide_tensors(size)
        else:
            return
        self._division.agree_on_random_numbers()
        self._at_teardown.enter_context(self._division.counting_replicas(module))

    def _require_hooks(self) -> None:
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

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        require_even(trainer)
        size = samples_of_batch(trainer)
        if self._pipeline is None:
            self._file.require_batches(trainer, self._replicas)
        elif size is not None:
            self._file.require_pipeline_batches(size, self._micro_batches, self._replicas)
            size //= self._micro_batches
        if self._position is not None and self._position.begins:
            begin_epoch(trainer, self._position)
        if size is not None:
            self.engine.set_train_micro_batch_size(size)

    # ------------------------------------------------------------------- steps

    def _zero_grad(self, set_to_none: bool = True) -> None:
        self.run.require_no_gradients()

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """DeepSpeed decides what is sent when; before a step there is nothing to block."""
        yield

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
        if self._run is None:
            raise ValueError(
                "Expected save_checkpoint during fit with strategy='accel_deepspeed', got it outside: DeepSpeed's"
                " engine is gone. Use ModelCheckpoint, or call it in on_train_end."
            )
        require_local(filepath, storage_options)
        if "optimizer_states" not in checkpoint:
            raise ValueError(
                "Expected save_weights_only=False with strategy='accel_deepspeed': DeepSpeed writes all of its state."
                " `accel convert` makes a file of weights from it."
            )
        rest = {key: value for key, value in checkpoint.items() if key not in _SAVED_BY_DEEPSPEED}
        self._run.save(filepath, rest, is_first=self.is_global_zero, barrier=self.barrier)

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
        safely = weights_only is not False
        if fitting:
            self._divide()
        if fitting and self._division is not None:
            checkpoint = {**read_divided(folder, self.stage, self._division, weights_only=safely), "state_dict": {}}
        else:
            checkpoint = open_deepspeed(folder, weights_only=safely).nest
        if fitting:
            if self._division is None:
                read_same_layout(folder, self.stage, self.world_size, weights_only=safely)
            self._continues_from = folder
            if "loops" in checkpoint:  # else the script of somebody else has written it
                loops = checkpoint["loops"]["fit_loop"]
                self._position = Position.of(loops)
                if self._position.begins:  # see [Note: Lightning's restarts]
                    self._position.write(loops)
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._continues_from is None:  # else DeepSpeed loads
            assert self.lightning_module is not None
            self.lightning_module.load_state_dict(in_memory(checkpoint["state_dict"]), strict=strict)

    # --------------------------------------------------------------------- end

    @override
    def on_exception(self, exception: BaseException) -> None:
        explain(exception)
        self._failed = self._failed or not isinstance(exception, KeyboardInterrupt)

    @override
    def teardown(self) -> None:
        self._at_teardown.close()
        self._continues_from = self._position = self._division = self._pipeline = None
        self._micro_batches = 1
        if self._run is not None:
            self._run.end(abandon=self._failed)
            self._run, self.model = None, self._lightning_module
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        register_each(strategy_registry, cls, cls.strategy_name, "DeepSpeed's own engine")
