"""How Fabric's accel strategies save and load."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.strategy import _apply_filter, _validate_keys_for_strict_loading
from lightning.fabric.utilities.types import _Stateful
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.core import Engine
from lightning_accel.core.checkpoint import is_directory, load
from lightning_accel.core.checkpoint.engine_state import load_model, model_shards, optimizer_shards, prepare_model
from lightning_accel.core.collecting import Collecting
from lightning_accel.plugins.checkpoint_io import AccelCheckpointIO, with_default
from lightning_accel.plugins.precision import engine_optimizer
from lightning_accel.strategies.checkpoints import Checkpoints, only_one
from lightning_accel.strategies.compact import compact
from lightning_accel.strategies.engine_module import EngineModule
from lightning_accel.strategies.files import detached, in_memory, loaded_for, require_intact
from lightning_accel.strategies.fitting import prepare_all
from lightning_accel.strategies.unanimous import unanimous


class SavingFabricStrategy(DDPStrategy):
    """Base of ``AccelFabricStrategy``: its checkpoints. It sets the attributes."""

    _checkpoints: Checkpoints

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """What reads and writes checkpoint files: the user's, or our own."""
        self._checkpoint_io = with_default(self._checkpoint_io)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoints.use(io)
        self._checkpoint_io = io

    @override
    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The state of the user's module: ``{}`` on ranks but 0 where no rank has it whole."""
        with _collected(module) as is_whole:
            state = super().get_module_state_dict(_inner(module))
            return detached(state) if is_whole else {}

    @override
    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load into the user's module."""
        load_model(_inner(module), state_dict, strict=strict, engine=_engine_of(module))

    @override
    def save_checkpoint(
        self,
        path: Any,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Save models and optimizers, and what else is in ``state``. All ranks take part."""
        if self._checkpoints.are_sharded:
            if storage_options is not None:
                raise TypeError("Expected no storage_options for a sharded checkpoint. Use state_dict_type='full'.")
            step = state.get("step")
            info = {"step": step} if isinstance(step, int) else {}
            self._checkpoints.save(path, self._in_parts(state, filter or {}), info)
            return
        collecting: Collecting | None = None
        if not filter and type(self.checkpoint_io) is AccelCheckpointIO:  # else somebody may look at values
            state = dict(state)
            for key, value in state.items():
                added = engine_optimizer(value) if isinstance(value, Optimizer) else None
                if added is not None:
                    collecting = collecting or Collecting(added.engine.collectives)
                    state[key] = added.state_dict(collecting)
        converted = self._convert_stateful_objects_in_state(state, filter=(filter or {}))

        def write() -> None:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(
                    checkpoint=compact(converted), path=path, storage_options=storage_options
                )

        unanimous("saving a checkpoint", write if collecting is None else partial(collecting.run, write))

    def _in_parts(self, state: dict[str, Any], filter: dict[str, Callable[[str, Any], bool]]) -> dict[str, Any]:
        """What is to be saved, with this rank's parts of models and optimizers."""
        found: dict[str, Any] = {}
        for key, value in state.items():
            added = engine_optimizer(value) if isinstance(value, Optimizer) else None
            if isinstance(value, EngineModule) and not value.engine.is_closed:
                converted: Any = model_shards(value.engine, value.module)
            elif added is not None:
                converted = optimizer_shards(added)
            else:
                converted = self._convert_stateful_objects_in_state({key: value}, {})[key]
            _apply_filter(key, filter, converted, found)
        return found

    @override
    def load_checkpoint(
        self,
        path: Any,
        state: nn.Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint, a directory or a file, or what ``state`` asks for. All ranks take part.

        Returns:
            What was not asked for.

        """
        self._checkpoints.finish()  # it may be the one that is being written
        if is_directory(path):
            loaded = load(path, weights_only=weights_only is not False)
        else:
            require_intact(self.checkpoint_io, path, is_first=self.is_global_zero)
            loaded = super().load_checkpoint(path, weights_only=weights_only)
        return hand_out(loaded, state, strict, self._prepare)

    def _prepare(self, receiver: Any, value: Any, strict: bool) -> Callable[[], Any]:
        """Find out whether a value fits what is to load it, as far as that can be told.

        Returns:
            What loads it, and returns what is in the receiver's place then. See [Note: what stays in a file].

        """
        load_it: Callable[[], Any]
        added = engine_optimizer(receiver) if isinstance(receiver, Optimizer) else None
        if isinstance(receiver, nn.Module):
            load_it = prepare_model(_inner(receiver), value, strict=strict, engine=_engine_of(receiver))
        elif added is not None:
            load_it = added.prepare_load(loaded_for(receiver, value))
        elif isinstance(receiver, _Stateful):  # other optimizers, too

            def load_it() -> None:
                receiver.load_state_dict(in_memory(value))
        else:
            return partial(in_memory, value)

        def load() -> Any:
            load_it()
            return receiver

        return load


def hand_out(
    loaded: dict[str, Any],
    state: nn.Module | Optimizer | dict[str, Any] | None,
    strict: bool,
    prepare: Callable[[Any, Any, bool], Callable[[], Any]],
) -> dict[str, Any]:
    """Load what a checkpoint has into what asks for it: into all of that, or none. All ranks take part.

    Args:
        loaded: The checkpoint; what is handed out is taken from it.
        state: A model or an optimizer, or several of them and other things by name.
        strict: Raise if names are missing.
        prepare: For a receiver, its value and ``strict``: finds out whether they fit, and returns what loads it and
            says what is in the receiver's place then.

    Returns:
        What was not asked for.

    """
    if isinstance(state, (nn.Module, Optimizer)):
        (load_it,) = prepare_all([partial(prepare, state, only_one(loaded, state), strict)])
        load_it()
        return {}
    if state:
        _validate_keys_for_strict_loading(state, loaded, strict=strict)
        names = [name for name in state if name in loaded]
        ready = prepare_all([partial(prepare, state[name], loaded.pop(name), strict) for name in names])
        for name, load_it in zip(names, ready, strict=True):
            state[name] = load_it()
    remainder: dict[str, Any] = in_memory(loaded)
    return remainder


def _collected(module: nn.Module) -> AbstractContextManager[bool]:
    if isinstance(module, EngineModule) and not module.engine.is_closed:
        return module.engine.collected_parameters()
    return nullcontext(True)


def _engine_of(module: nn.Module) -> Engine | None:
    return module.engine if isinstance(module, EngineModule) and not module.engine.is_closed else None


def _inner(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, EngineModule) else module
