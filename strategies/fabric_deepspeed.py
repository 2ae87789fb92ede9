"""accel_deepspeed for Lightning Fabric: DeepSpeed's own engine, on CUDA and on the CPU.

[Note: whose work it is, with Fabric]
DeepSpeed shards, reduces, scales losses, clips, steps and writes checkpoints. The loop counts micro-batches, divides
losses by their number, says when to step, and steps schedules, as with every other strategy of this package. So that a
loop which was written for DeepSpeed's own counting is not taken for one of Fabric's, the file's
``gradient_accumulation_steps`` are held against what the loop does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import DDPStrategy, _StrategyRegistry
from lightning.fabric.strategies.strategy import _BackwardSyncControl, _validate_keys_for_strict_loading
from lightning.fabric.utilities.types import ReduceOp, _Stateful
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.convert.deepspeed import OWN_KEYS, open_deepspeed
from lightning_accel.convert.deepspeed_files import find_deepspeed
from lightning_accel.core.agreement import synchronise
from lightning_accel.strategies.deepspeed_division import Division, divide_tensors
from lightning_accel.strategies.deepspeed_file import DeepSpeedFile
from lightning_accel.strategies.deepspeed_installed import (
    divided_as_made,
    join_process_group,
    local_rank_known,
    require_deepspeed,
    require_whole,
)
from lightning_accel.strategies.deepspeed_pipeline import find_pipeline
from lightning_accel.strategies.deepspeed_precision import EngineRounding
from lightning_accel.strategies.deepspeed_run import (
    RunningEngine,
    clipped_otherwise,
    only_optimizer,
    read_divided,
    read_same_layout,
    require_local,
    require_trainable,
)
from lightning_accel.strategies.deepspeed_told import EngineFile
from lightning_accel.strategies.deepspeed_watch import Watch, run_of, state_of_optimizer
from lightning_accel.strategies.files import in_memory
from lightning_accel.strategies.launched import fractional, register_each, require_start_method
from lightning_accel.strategies.options import reject_unknown


class AccelDeepSpeedStrategy(DDPStrategy):
    """DeepSpeed's own engine behind Fabric; see :class:`lightning_accel.strategies.AccelDeepSpeedStrategy`.

    Args:
        stage: The ZeRO stage, 0 to 3. Default: 2, or what ``config`` says.
        config: A DeepSpeed JSON file, or a dict of what would be in it. DeepSpeed gets all of it but an optimizer and a
            schedule, which are the loop's. Without ``gradient_clipping`` gradients are not clipped.
        accelerator: As for Fabric's strategies, likewise the next five.
        parallel_devices: The devices of this node.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: Reads and writes checkpoint files that are not DeepSpeed's.
        precision: One of Fabric's plugins for 32-true, bf16-true, bf16-mixed and 16-mixed.
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

    def __init__(
        self,
        stage: int | None = None,
        config: DeepSpeedFile | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork"] = "popen",
        **unknown: Any,
    ) -> None:
        require_deepspeed()
        reject_unknown(type(self), unknown)
        require_start_method(start_method)
        self._file = EngineFile(config, stage)
        self.stage = self._file.stage
        self._watches: list[Watch] = []
        self._division: Division | None = None
        self._micro_batches: int | None = None  # of a step, if the file says so
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
        self._backward_sync_control = _NothingToBlock()

    @property
    def _runs(self) -> list[RunningEngine]:
        return [watch.run for watch in self._watches]

    @property
    def engines(self) -> list[Any]:
        """DeepSpeed's, one for each model that was set up with an optimizer."""
        return [run.engine for run in self._runs]

    @property
    @override
    def precision(self) -> Precision:
        """What DeepSpeed leaves to do; made from the plugin that Fabric chose."""
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if precision is not None and not isinstance(precision, EngineRounding):
            precision = EngineRounding(*self._file.computes_in(precision, self.accelerator))
        self._precision = precision

    # ------------------------------------------------------------------ set-up

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        with local_rank_known(self.local_rank):
            join_process_group(self.root_device, self._process_group_backend, self._timeout)
        if self._file.tensor_parallel_size > 1:
            self._division = divide_tensors(self._file.tensor_parallel_size)
            self._division.agree_on_random_numbers()

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that share a replica of the model get the same samples."""
        return super().distributed_sampler_kwargs if self._division is None else self._division.sampler_kwargs

    @property
    def _replicas(self) -> int:
        return self.world_size if self._division is None else self._division.replicas

    @override
    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """What ``fabric.init_module`` is: at stage 3 each rank makes its part of each parameter."""
        contexts = ExitStack()
        contexts.enter_context(super().module_init_context(empty_init))
        if self.stage == 3 and self._division is None:
            assert isinstance(self.precision, EngineRounding)
            contexts.enter_context(local_rank_known(self.local_rank))
            contexts.enter_context(divided_as_made(self.root_device, self._file.told_before(self.precision.precision)))
        return contexts

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Set a model up that is not trained: it stays whole on each rank, with rank 0's values.

        Raises:
            ValueError: If it was made in parts.

        """
        require_whole(module, "fabric.setup(model) without an optimizer")
        synchronise(module)
        return module

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Have DeepSpeed's engine take a model and its optimizer over. All ranks take part.

        Returns:
            The engine, the optimizer as it was given, and the schedule, which the loop steps.

        Raises:
            ValueError: If the engine cannot train them, or the file's batch sizes do not add up.

        """
        optimizer = only_optimizer(optimizers)
        require_trainable(module, optimizer)
        if find_pipeline(module, self.stage) is not None:
            raise ValueError(
                "Expected a model that is no PipelineModule with Fabric, got one. Use the Trainer, whose strategy deals"
                " samples to pipelines, or deepspeed.initialize by hand."
            )
        assert isinstance(self.precision, EngineRounding)
        synchronise(module)
        self._micro_batches = self._file.begin_loop(self._replicas)
        told = self._file.told(
            self._replicas,
            module,
            self.precision.precision,
            accumulation=self._micro_batches or 1,
            clipping=self._file.clipping,
        )
        with local_rank_known(self.local_rank):
            run = RunningEngine(module, module, optimizer, told, self.root_device, self._division)
        assert run.optimizer is optimizer
        self._watches.append(Watch(run, is_divided=self.stage == 3, rounded=self.precision.rounded))
        return run.engine, [optimizer], scheduler

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Refused: DeepSpeed's engine takes a model and its optimizer together."""
        raise ValueError(
            "Expected fabric.setup(model, optimizer) with strategy='accel_deepspeed', got fabric.setup_optimizers:"
            " DeepSpeed's engine takes a model and its optimizer together."
        )

    # ------------------------------------------------------------------- steps

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run DeepSpeed's backward: gradients are added to those since the last step.

        Raises:
            ValueError: If there are several engines and no module says which, or the file wants a step first.

        """
        run = self._run_of_module(module)
        if run.backwards == self._micro_batches:
            raise self._counted_otherwise(f"another backward after {run.backwards}")
        run.add_gradients(tensor, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Run DeepSpeed's step, which clips and updates.

        Raises:
            ValueError: If the first step comes after fewer micro-batches than the file says.

        """
        closure: Callable[[], Any] | None = kwargs.pop("closure", None)
        run = run_of(optimizer)
        if run is None:
            raise ValueError(
                "Expected an optimizer that was set up together with its model, by fabric.setup(model, optimizer), got"
                f" {type(optimizer).__name__}."
            )
        result = None if closure is None else closure()
        # A short window at the end of an epoch is the loop's own affair; a loop that leaves counting to DeepSpeed steps
        # after the very first micro-batch.
        is_first = run.engine.global_steps == 0
        if is_first and self._micro_batches is not None and 0 < run.backwards < self._micro_batches:
            raise self._counted_otherwise(f"the first step after {run.backwards}")
        run.step(**kwargs)
        return result

    def _counted_otherwise(self, found: str) -> ValueError:
        return ValueError(
            f"Expected optimizer.step() after {self._micro_batches} micro-batches, as {self._file.config.where} says"
            f" (gradient_accumulation_steps), got {found}. With Fabric the loop counts: divide each loss by"
            f" {self._micro_batches} and step after as many, or leave the key out."
        )

    def _run_of_module(self, module: nn.Module | None) -> RunningEngine:
        found = [run for run in self._runs if module is None or run.engine is module]
        if len(found) == 1:
            return found[0]
        if not found:
            raise ValueError(
                "Expected fabric.backward for a model that was set up with its optimizer, by fabric.setup(model,"
                " optimizer), got it for none."
            )
        raise ValueError(
            f"Expected fabric.backward(loss, model=model), as {len(found)} models were set up, got it without a model:"
            " each has an engine of its own."
        )

    @override
    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> NoReturn:
        """Refused: DeepSpeed's step clips, and the norm is known only then."""
        raise self._clips_itself(optimizer, f"{max_norm} by norm")

    @override
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float | int) -> NoReturn:
        """Refused: DeepSpeed's step clips, and by norm only."""
        raise self._clips_itself(optimizer, f"{clip_val} by value")

    def _clips_itself(self, optimizer: Optimizer, asked: str) -> ValueError:
        run = run_of(optimizer)
        return clipped_otherwise(
            0.0 if run is None else run.clipping,
            f"{asked} by fabric.clip_gradients",
            "Say gradient_clipping in the file and leave the call out: the norm is known in optimizer.step() only, and"
            " is fabric.strategy.engines[0].get_global_grad_norm() after it.",
        )

    @override
    def all_reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        """Reduce a tensor over ranks, one of each replica of a divided model; the mean of integers is a fraction."""
        if group is None and self._division is not None:
            group = self._division.across
        return super().all_reduce(fractional(tensor, reduce_op), group, reduce_op)

    # ------------------------------------------------------------- checkpoints

    @override
    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer that no engine has.

        Raises:
            ValueError: If one has it: what the optimizer has then are flat parts.

        """
        if run_of(optimizer) is not None:
            raise state_of_optimizer("optimizer.state_dict()")
        return super().get_optimizer_state(optimizer)

    @override
    def save_checkpoint(
        self,
        path: Any,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Write a directory as DeepSpeed does, with what else is in ``state``. All ranks take part.

        Without an engine in ``state``, it is a file as Fabric's.

        Raises:
            ValueError: If there are several engines in it, or one without its optimizer; if the path is not a local
                one, or DeepSpeed has a name for something else.

        """
        run = self._run_in(state)
        if run is None:
            super().save_checkpoint(path, state, storage_options, filter)
            return
        path = str(self.broadcast(path))
        require_local(path, storage_options)
        if filter:
            raise ValueError(
                "Expected no filter with strategy='accel_deepspeed', got one: DeepSpeed writes all of its state."
                " `accel convert` makes a file of weights from it."
            )
        others = {key: value for key, value in state.items() if not _is_of(run, value)}
        taken = sorted(OWN_KEYS & others.keys())
        if taken:
            raise ValueError(
                f"Expected other names in the state, got {', '.join(map(repr, taken))}: DeepSpeed's files have entries"
                " of their own called so."
            )
        rest = self._convert_stateful_objects_in_state(others, filter={})
        run.save(path, rest, is_first=self.is_global_zero, barrier=self.barrier)

    @override
    def load_checkpoint(
        self,
        path: Any,
        state: nn.Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint, or what ``state`` asks for. All ranks take part.

        An engine goes on from a directory of DeepSpeed's, of the same stage and number of ranks. Models without one
        load the weights of any checkpoint.

        Returns:
            What was not asked for.

        Raises:
            FileNotFoundError: If there is nothing.
            ValueError: If an engine is to load something else.

        """
        named = state if isinstance(state, dict) else {}
        if any(_is_of(run, state) for run in self._runs):
            raise state_of_optimizer("fabric.load_raw")
        run = self._run_in(named)
        folder = find_deepspeed(Path(path)) if "://" not in str(path) else None
        if run is None:
            return self._load_without_engine(path, folder, state, strict, weights_only)
        if not Path(path).exists():
            raise FileNotFoundError(f"Expected a checkpoint at {path}, found nothing.")
        if folder is None:
            raise ValueError(
                f"Expected a checkpoint of DeepSpeed's to continue from with strategy='accel_deepspeed', got {path}. To"
                " start from its weights, load them into the model before fabric.setup; to continue from it, use"
                " strategy='accel_zero2'."
            )
        safely = weights_only is not False
        if self._division is None:
            files = read_same_layout(folder, self.stage, self.world_size, weights_only=safely)
            loaded = in_memory({key: value for key, value in files.model.items() if key not in OWN_KEYS})
        else:
            loaded = read_divided(folder, self.stage, self._division, weights_only=safely)
        others = {key: value for key, value in named.items() if not _is_of(run, value)}
        _validate_keys_for_strict_loading(others, loaded, strict)
        run.load(folder, strict=strict)
        for key, value in others.items():
            if key in loaded:
                named[key] = _loaded_by(value, loaded.pop(key))
        return loaded

    def _load_without_engine(
        self, path: Any, folder: Path | None, state: Any, strict: bool, weights_only: bool | None
    ) -> dict[str, Any]:
        if folder is None:
            return super().load_checkpoint(path, state, strict, weights_only)
        loaded = in_memory(open_deepspeed(folder, weights_only=weights_only is not False).nest)
        if isinstance(state, nn.Module):
            self.load_module_state_dict(state, loaded["state_dict"], strict=strict)
            return {}
        models = [key for key, value in (state or {}).items() if isinstance(value, nn.Module)]
        if len(models) > 1 or any(isinstance(value, Optimizer) for value in (state or {}).values()):
            raise ValueError(
                f"Expected one model in the state for {path}, which DeepSpeed has written for one, got {list(state)}."
                " To go on with its optimizer, set both up by fabric.setup(model, optimizer) first."
            )
        if models:
            loaded = {key: value for key, value in loaded.items() if key not in ("optimizer_states", *models)}
            loaded[models[0]] = loaded.pop("state_dict")
        _validate_keys_for_strict_loading(state or {}, loaded, strict)
        for key, value in (state or {}).items():
            if key in loaded:
                state[key] = _loaded_by(value, loaded.pop(key))
        return loaded

    def _run_in(self, state: Mapping[str, Any]) -> RunningEngine | None:
        """The engine whose model or optimizer is in a state; None if there is none.

        Raises:
            ValueError: If there are several, or of one only a part.

        """
        found = [run for run in self._runs if any(_is_of(run, value) for value in state.values())]
        if len(found) > 1:
            raise ValueError(
                f"Expected one model that was set up in the state, got {len(found)}: DeepSpeed writes each to a"
                " directory of its own."
            )
        for run in found:
            parts = (run.engine, run.optimizer)
            if not all(any(value is part for value in state.values()) for part in parts):
                raise ValueError(
                    "Expected the model and its optimizer in the state with strategy='accel_deepspeed', got"
                    f" {', '.join(state)}: DeepSpeed writes and reads them together. `accel convert` makes a file of"
                    " weights from what it writes."
                )
        return found[0] if found else None

    # --------------------------------------------------------------------- end

    @override
    def teardown(self) -> None:
        """Give all models their values again and end the engines. Fabric itself never calls this."""
        for watch in self._watches:
            watch.end()
            watch.run.end(abandon=False)
        self._watches.clear()
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        register_each(strategy_registry, cls, cls.strategy_name, "DeepSpeed's own engine")


class _NothingToBlock(_BackwardSyncControl):
    """DeepSpeed decides what is sent when; before a step there is nothing to block."""

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()


def _is_of(run: RunningEngine, value: Any) -> bool:
    return value is run.engine or value is run.optimizer


def _loaded_by(receiver: Any, value: Any) -> Any:
    """What is in a receiver's place when it has loaded a value."""
    if not isinstance(receiver, _Stateful):
        return value
    receiver.load_state_dict(value)
    return receiver
