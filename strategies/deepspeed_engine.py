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
from lightning.fabric.strategies import _StrategyRegistry
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_accel.convert.deepspeed import open_deepspeed
from lightning_accel.convert.deepspeed_files import find_deepspeed
from lightning_accel.core.agreement import synchronise
from lightning_accel.strategies.deepspeed_file import DeepSpeedFile, samples_of_batch
from lightning_accel.strategies.deepspeed_installed import join_process_group, local_rank_known, require_deepspeed
from lightning_accel.strategies.deepspeed_precision import EnginePrecision
from lightning_accel.strategies.deepspeed_run import (
    RunningEngine,
    only_optimizer,
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

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        evaluate_writably(trainer)  # parameters that are gathered in evaluation are written to later
        self._failed = False
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        synchronise(self.model)
        if fitting:
            self._require_hooks()
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
        assert self.model is not None
        assert isinstance(self.precision_plugin, EnginePrecision)
        with self._file.configuring(module):
            super().setup_optimizers(trainer)
        given = only_optimizer(self.optimizers)
        require_trainable(module, given)
        automatic = module.automatic_optimization
        told = self._file.told(
            self.world_size,
            module,
            self.precision_plugin.precision,
            accumulation=trainer.accumulate_grad_batches if automatic else 1,
            clipping=trainer.gradient_clip_val if automatic else self._file.clipping,
        )
        if is_files := isinstance(given, _MockOptimizer):
            told["optimizer"] = self._file.optimizer_section()
        self._run = RunningEngine(self.model, module, None if is_files else given, told, self.root_device)
        self.model = self.run.engine
        self.optimizers = [self.run.optimizer]
        if is_files:
            self.lr_scheduler_configs = self._file.schedule(self.run.optimizer, module)
        self._at_teardown.callback(hold_schedules(trainer, lambda: self.run.step_was_skipped))
        if self._continues_from is not None:
            self.run.load(self._continues_from, strict=module.strict_loading)

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
        self._file.require_batches(trainer, self.world_size)
        if self._position is not None and self._position.begins:
            begin_epoch(trainer, self._position)
        size = samples_of_batch(trainer)
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
        checkpoint = open_deepspeed(folder, weights_only=weights_only is not False).nest
        if fitting:
            read_same_layout(folder, self.stage, self.world_size, weights_only=weights_only is not False)
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
        self._continues_from = self._position = None
        if self._run is not None:
            self._run.end(abandon=self._failed)
            self._run, self.model = None, self._lightning_module
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        register_each(strategy_registry, cls, cls.strategy_name, "DeepSpeed's own engine")
