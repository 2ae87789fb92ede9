"""What an ``Accelerator`` writes down: checkpoints, models, metrics, profiles."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.fabric.wrappers import _unwrap_compiled
from torch import nn

from lightning_accel.core.placement import Rest
from lightning_accel.core.registry import engines_of
from lightning_accel.manual.model_files import save_model, save_object
from lightning_accel.manual.processes import Processes
from lightning_accel.manual.profiling import profiled
from lightning_accel.manual.states import Prepared, States, require_stateful
from lightning_accel.manual.tracking import Trackers
from lightning_accel.strategies.engine_module import EngineModule
from lightning_accel.strategies.fabric import AccelFabricStrategy


class Records(Processes):
    """Base of ``Accelerator``, which sets the attributes."""

    _prepared: Prepared
    _states: States
    _strategy: AccelFabricStrategy
    _trackers: Trackers

    # ------------------------------------------------------------- checkpoints

    def save_state(self, output_dir: _PATH | None = None) -> str:
        """Save all that was prepared or registered, random numbers and the loaders' places. All ranks call it together.

        Args:
            output_dir: Where to. It is a directory to which every rank writes its part, and which is there as a whole
                or not at all; with a strategy of ``state_dict_type="full"`` it is a file. By default the next
                ``checkpoints/checkpoint_<n>`` under ``project_dir``.

        Returns:
            The path.

        Raises:
            ValueError: If there is neither a path nor a ``project_dir``, or there is something else.
            RuntimeError: If not all ranks come within ``patience_s``.
            OSError: If it cannot be written; on every rank.

        """
        return self._states.save(None if output_dir is None else Path(output_dir))

    def load_state(self, input_dir: _PATH | None = None, *, strict: bool = True, weights_only: bool = True) -> str:
        """Load what ``save_state`` has saved, under any row, precision and number of ranks. All ranks call it together.

        Prepared loaders go on where they were: the next ``for`` has the batches that the epoch had left.

        Args:
            input_dir: Where from; by default the latest of ``project_dir``.
            strict: Whether a model's names must be the same.
            weights_only: Refuse everything but tensors, numbers, strings and their collections.

        Returns:
            The path.

        Raises:
            ValueError: If there is none, it was written by something else, or other objects are prepared or registered.
            RuntimeError: If not all ranks come within ``patience_s``.

        """
        source = None if input_dir is None else Path(input_dir)
        return self._states.load(source, strict=strict, weights_only=weights_only)

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Have objects saved and loaded with the rest, such as an own scheduler or counter. Rank 0's state is saved.

        Args:
            objects: With ``state_dict`` and ``load_state_dict``; in the same order whenever a run goes on.

        Raises:
            ValueError: If one lacks these.

        """
        require_stateful(objects)
        self._prepared.registered.extend(objects)

    def save(self, obj: Any, f: _PATH, safe_serialization: bool = False) -> None:
        """Write an object to a file, on process 0 alone. The file is complete, or what was there before is still there.

        Args:
            obj: What ``torch.save`` takes; a dictionary of tensors for safetensors.
            f: The path.
            safe_serialization: Write safetensors.

        Raises:
            ValueError: If safetensors has no such thing.

        """
        if self.is_main_process:
            save_object(obj, Path(f), safe_serialization=safe_serialization)

    def save_model(
        self,
        model: nn.Module,
        save_directory: _PATH,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a model's weights as Hugging Face has them: safetensors, with an index if there are several files.

        All ranks call it together. Process 0 holds the model once in host memory, one parameter of it twice.

        Args:
            model: A prepared one.
            save_directory: The folder; other files in it stay.
            max_shard_size: Bytes of a file at most, as a number or as ``"500MB"``.
            safe_serialization: If False, ``torch.save`` writes ``pytorch_model.bin``.

        Raises:
            ValueError: If the model was not prepared, or has a state that the format does not have.
            OSError: If it cannot be written; on every rank.

        """
        module = self._engine_of(model)
        self._states.meet("save_model")
        save_model(module, Path(save_directory), max_shard_size, self._peers, safe_serialization=safe_serialization)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The state of a model under the user's names. All ranks call it together.

        Args:
            model: A prepared one, as it was returned or unwrapped; or any that has nothing to do with these.
            unwrap: Without meaning here: names are always the user's.

        Returns:
            The state in full precision; ``{}`` on ranks but 0 where no rank has it whole.

        Raises:
            ValueError: If it is a part of a prepared model whose parameters rest sharded.
            RuntimeError: If no rank has it whole, and not all of them come within ``patience_s``.

        """
        engine = self._find(model)
        if engine is not None:
            inner = engine.engine
            if inner.row.parameters is Rest.SHARDED or any(unit.memory.has_master for unit in inner.units):
                self._states.meet("get_state_dict")
            return self._strategy.get_module_state_dict(engine)
        if any(part.row.parameters is Rest.SHARDED for part in engines_of(model)):
            raise ValueError(
                f"Expected a whole model that was prepared, or none of its parts, got a {type(model).__name__} that is"
                " one: no rank need have its values. Take them from accelerator.get_state_dict(model)."
            )
        return dict(model.state_dict())

    # ------------------------------------------------------------------- track

    def init_trackers(
        self,
        project_name: str,
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Start the loggers that ``log_with`` names.

        Args:
            project_name: The name of the project.
            config: Hyperparameters to note.
            init_kwargs: For the loggers' constructors, by the names in ``log_with``.

        Raises:
            ValueError: If there are arguments for a logger that was not asked for.

        """
        self._trackers.start(project_name, config, init_kwargs or {})

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Note metrics; process 0's are written.

        Args:
            values: Numbers, or tensors of one element, by name.
            step: When; loggers count by themselves if not given.
            log_kwargs: For the loggers' ``log_metrics``, by the names in ``log_with``.

        Raises:
            RuntimeError: If ``init_trackers`` was not called.
            ValueError: If a value is no number.

        """
        self._trackers.log(values, step, log_kwargs or {})

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """A logger by its name in ``log_with``; one that was passed as an object by its class's name.

        Args:
            name: The name.
            unwrap: Return what the logger wraps, such as TensorBoard's writer.

        Raises:
            ValueError: If there is none.

        """
        logger: Any = self._trackers.find(name)
        return logger.experiment if unwrap else logger

    @property
    def trackers(self) -> list[Any]:
        """The loggers that were started."""
        return list(self._trackers.loggers)

    def end_training(self) -> None:
        """Write what loggers have left, and wait for checkpoints that are being written. All ranks call it together."""
        self._trackers.end()
        self._strategy._checkpoints.finish()
        self.wait_for_everyone()

    def profile(self, output_trace_dir: _PATH | None = None, **kwargs: Any) -> AbstractContextManager[Any]:
        """The profiler of torch, on every rank.

        Args:
            output_trace_dir: Where ``profile_rank<rank>.json`` is written when it is over.
            kwargs: As for ``torch.profiler.profile``.

        Returns:
            A context manager that gives the profiler.

        """
        folder = None if output_trace_dir is None else Path(output_trace_dir)
        return profiled(self.device, self.process_index, folder, kwargs)

    def _engine_of(self, model: nn.Module) -> EngineModule:
        engine = self._find(model)
        if engine is not None:
            return engine
        raise ValueError(
            f"Expected a model that was prepared, got a {type(model).__name__} that was not. Use what"
            " accelerator.prepare(model) has returned."
        )

    def _find(self, model: nn.Module) -> EngineModule | None:
        inner = _unwrap_compiled(model)[0]
        for prepared, engine in zip(self._prepared.models, self._prepared.engines, strict=True):
            if (
                model is prepared
                or inner is _unwrap_compiled(prepared)[0]
                or inner is _unwrap_compiled(engine.module)[0]
            ):
                return engine
        return None
