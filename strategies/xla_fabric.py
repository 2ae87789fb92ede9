"""accel_xla for Fabric: the rows on XLA devices, in one process (of each host).

[Note: what is a program in Fabric]
What a loop does on the devices is recorded, and runs when it is cut off: after each optimizer step, after each backward
within ``fabric.no_backward_sync``, and when a loader that was set up is asked for its next batch, so that a loop that
only evaluates is cut, too. A value that Python asks for in between (``.item()``, a condition) cuts there, and waits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import CheckpointIO, Precision
from lightning.fabric.strategies import Strategy, _StrategyRegistry
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.utilities.init import _EmptyInit
from lightning.fabric.utilities.types import _Stateful
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_accel.core import GradScaler
from lightning_accel.core.checkpoint.engine_state import prepare_model
from lightning_accel.core.checkpoint.recorder import is_recorded
from lightning_accel.core.partition import Units
from lightning_accel.core.xla import XLAEngine
from lightning_accel.core.xla.hosts import hosts
from lightning_accel.core.xla.placing import Placing
from lightning_accel.plugins.xla_precision import suitable
from lightning_accel.strategies.compact import compact
from lightning_accel.strategies.engine_module import not_set_up, without_module
from lightning_accel.strategies.fabric_saving import hand_out
from lightning_accel.strategies.files import in_memory
from lightning_accel.strategies.launched import fractional
from lightning_accel.strategies.options import Recomputed
from lightning_accel.strategies.xla_shared import (
    OneProgram,
    put_samples,
    read,
    seed_devices,
)
from lightning_accel.strategies.xla_values import fetched


class AccelXLAStrategy(OneProgram, Strategy):
    """The placement rows on all XLA devices; see :class:`lightning_accel.strategies.AccelXLAStrategy`.

    There is one process with one program over all devices. A loader that was set up gives the global batch, cut over
    the devices along the first dimension of its tensors; on several hosts each gives its part of it (not run there).

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
        accelerator: As for Fabric's strategies, likewise the next two.
        checkpoint_io: Reads and writes checkpoint files.
        precision: The precision.
        unknown: Options that do not exist; refused.

    Raises:
        ValueError: If there is no such row, it takes no ``shard_size``, or ``activation_checkpointing`` says nothing.
        TypeError: If there are options that do not exist, or ``grad_scaler`` is another kind of scaler.

    """

    def __init__(
        self,
        sharding: str = "fsdp",
        shard_size: int | None = None,
        units: Units | None = None,
        activation_checkpointing: Recomputed = False,
        grad_scaler: GradScaler | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        **unknown: Any,
    ) -> None:
        self._choose(sharding, shard_size, units, activation_checkpointing, grad_scaler, unknown)
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision=precision)
        self._backward_sync_control = _SyncControl(self)
        self._engines: list[weakref.ref[XLAEngine]] = []
        self._hooks: list[RemovableHandle] = []
        self._homes = WeakIdKeyDictionary()  # parameters on the devices by those they were made of
        self._placing: Placing | None = None

    @property
    def engines(self) -> list[XLAEngine]:
        """One for each module that was set up and is still in use."""
        found = (reference() for reference in self._engines)
        return [engine for engine in found if engine is not None and not engine.is_closed]

    def engine_of(self, module: nn.Module) -> XLAEngine | None:
        """The engine of a module that was set up, or None.

        Args:
            module: The user's module.

        """
        return next((engine for engine in self.engines if engine.module is module), None)

    @property
    def _num_nodes(self) -> int:
        return self.num_nodes

    @_num_nodes.setter
    def _num_nodes(self, num_nodes: int) -> None:  # Fabric writes to it
        self.num_nodes = num_nodes

    @property
    @override
    def precision(self) -> Precision:
        """The precision plugin; autocast is that of XLA."""
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        self._precision = None if precision is None else suitable(precision, self._given_scaler)

    @property
    @override
    def _plugin(self) -> Precision:
        return self.precision

    # ------------------------------------------------------------------ set-up

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._set_rank()

    @override
    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Within it, modules are made in host memory: they go to the devices, in parts, when they are set up."""
        stack = ExitStack()
        stack.enter_context(_EmptyInit(enabled=bool(empty_init)))
        stack.enter_context(self.precision.module_init_context())
        return stack

    @override
    def module_to_device(self, module: nn.Module) -> None:
        """Nothing: a module is moved, in parts, when it is set up."""

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        """Move a module to the devices, where it rests as the row says. It has new parameters then.

        Raises:
            ValueError: If it is on the devices already, parts of it are on the meta device, or a unit or a module to
                recompute does not exist.

        """
        there = next((name for name, p in module.named_parameters() if p.device.type == "xla"), None)
        if there is not None:  # another engine would go on giving units the parameters that it knows
            raise ValueError(
                f"Expected a module in host memory, got a {type(module).__name__} whose {there!r} is on XLA devices: it"
                " was set up before, or shares parameters with a module that was. Set up a model once, and further"
                " optimizers of it by fabric.setup_optimizers; strategy.teardown() of the Fabric that has it moves it"
                " back."
            )
        if not self.engines:
            seed_devices()
        former = list(module.parameters())
        engine = self._start(module)
        for old, new in zip(former, module.parameters(), strict=True):
            self._homes[old] = new

        def settle(module: nn.Module, keys: Any) -> None:
            if not (engine.is_closed or is_recorded(module)):
                engine.settle()

        # It also keeps the engine as long as its module.
        self._hooks.append(module.register_load_state_dict_post_hook(settle))
        self._engines.append(weakref.ref(engine))
        self._scale_for(*self.engines)
        return module

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Have an optimizer update the parameters on the devices, also if it was made before they were there.

        Raises:
            ValueError: If no module that was set up has them, or it is ``fused``, which XLA does not have.

        """
        groups = [[self._homes.get(p, p) for p in group["params"]] for group in optimizer.param_groups]
        given = {parameter for group in groups for parameter in group}
        for engine in self.engines:
            if given <= set(engine.module.parameters()):
                state = optimizer.state_dict() if optimizer.state else None
                for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                    group["params"] = parameters
                engine.add_optimizer(optimizer)
                if state is not None:
                    optimizer.state.clear()
                    engine.load_optimizer_state(optimizer, state)
                return optimizer
        raise without_module(optimizer, len(self.engines))

    @override
    def process_dataloader(self, dataloader: DataLoader) -> DataLoader:
        """Have a loader give batches that are cut over the devices."""
        return _CutLoader(dataloader, self)  # type: ignore[return-value]

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None) -> Any:
        """Cut a batch over the devices along the first dimension of its tensors.

        Raises:
            ValueError: If that is no multiple of the number of devices.

        """
        if self._placing is None:
            self._placing = Placing(self._shard_size)
        return put_samples(batch, self._placing.put_batch, self.root_device)

    # ------------------------------------------------------------------- steps

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward with the gradients of every module that was set up divided as the row says."""
        engines = self.engines
        with ExitStack() as stack:
            for engine in engines:
                stack.enter_context(engine.backward_context(cut=False))
            super().backward(tensor, module, *args, **kwargs)
        if not all(engine.is_boundary for engine in engines):
            engines[0].cut()

    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """What is given, if it is on the devices: it is of the global batch. What is in host memory, over hosts.

        The mean of integers is a fraction.
        """
        return self._reduced(fractional(tensor, reduce_op), reduce_op)

    # ------------------------------------------------------------- checkpoints

    @override
    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The state of a model, whole, in host memory."""
        state: dict[str, Any] = fetched(super().get_module_state_dict(module))
        return state

    @override
    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer, of whole parameters, in host memory."""
        state: dict[str, Any] = fetched(optimizer.state_dict())
        return state

    @override
    def save_checkpoint(
        self,
        path: Any,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Save models and optimizers, and what else is in ``state``, as one file of whole tensors."""
        saved = {name: _inner(value) for name, value in state.items()}
        converted = fetched(self._convert_stateful_objects_in_state(saved, filter=filter or {}))
        io = self.checkpoint_io

        def write() -> None:
            if self.is_global_zero:
                io.save_checkpoint(checkpoint=compact(converted), path=path, storage_options=storage_options)

        hosts().unanimous("saving a checkpoint", write)

    @override
    def load_checkpoint(
        self,
        path: Any,
        state: nn.Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint, or what ``state`` asks for: a file, or a directory that another strategy has saved.

        Returns:
            What was not asked for.

        """
        loaded = read(
            path,
            self.checkpoint_io,
            lambda: self.checkpoint_io.load_checkpoint(path, weights_only=weights_only),
            weights_only,
        )
        return hand_out(loaded, state, strict, self._prepare)

    def _prepare(self, receiver: Any, value: Any, strict: bool) -> Callable[[], Any]:
        receiver = _inner(receiver)
        if isinstance(receiver, nn.Module):
            load_model = prepare_model(receiver, value, strict=strict)
            engine = self.engine_of(receiver)

            def load() -> Any:
                load_model()
                if engine is not None:
                    engine.settle()
                return receiver
        elif isinstance(receiver, Optimizer):
            _require_fit(receiver, value)

            def load() -> Any:
                owner = self._owner(receiver)
                if owner is None:
                    receiver.load_state_dict(in_memory(value))
                else:
                    owner.load_optimizer_state(receiver, in_memory(value))
                return receiver
        else:

            def load() -> Any:
                if not isinstance(receiver, _Stateful):
                    return in_memory(value)
                receiver.load_state_dict(in_memory(value))
                return receiver

        return load

    def _owner(self, optimizer: Optimizer) -> XLAEngine | None:
        return next((engine for engine in self.engines if optimizer in engine.optimizers), None)

    # --------------------------------------------------------------------- end

    @override
    def teardown(self) -> None:
        """Move models and optimizers to host memory, whole. Fabric itself never calls this."""
        for engine in self.engines:
            engine.bring_home()
            engine.module.cpu()  # what is neither a parameter nor a buffer
        while self._hooks:
            self._hooks.pop().remove()
        self._engines.clear()
        self._scale_for()
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        if cls.strategy_name not in strategy_registry:
            strategy_registry.register(cls.strategy_name, cls, description=f"{cls.__name__}, row fsdp, one process")


class _SyncControl(_BackwardSyncControl):
    """``fabric.no_backward_sync``: around each backward that no optimizer step follows."""

    def __init__(self, strategy: AccelXLAStrategy) -> None:
        self._strategy = weakref.ref(strategy)

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        if not enabled:
            return nullcontext()
        strategy = self._strategy()
        engine = None if strategy is None else strategy.engine_of(module)
        if engine is None:
            raise not_set_up(module)
        return engine.no_sync()


class _CutLoader:
    """A loader whose batches are cut over the devices. See [Note: what is a program in Fabric]."""

    def __init__(self, loader: DataLoader, strategy: AccelXLAStrategy) -> None:
        self.__dict__.update(vars(loader))  # as Fabric's own, which passes on what it finds there
        self._loader = loader
        self._strategy = strategy

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield self._strategy.batch_to_device(batch)
            _cut()


def _inner(value: Any) -> Any:
    return value._loader if isinstance(value, _CutLoader) else value


def _cut() -> None:
    import torch_xla

    torch_xla.sync()


def _require_fit(optimizer: Optimizer, state: Any) -> None:
    """Raise unless a state has the groups of an optimizer: torch would find out when the model has been loaded."""
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in state["param_groups"]]
    if ours != theirs:
        raise ValueError(
            f"Expected the state of an optimizer with {ours} parameters in its groups, as {type(optimizer).__name__}"
            f" has, got one with {theirs}. It was made for another optimizer or model."
        )
