"""The module that `fabric.setup` returns, and what it is within."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.core import Engine
from lightning_accel.core.structure import called_by_compiled_code


class EngineModule(nn.Module):
    """A module together with the engine that trains it: what ``fabric.setup`` wraps.

    Args:
        module: The user's module.
        engine: Its engine.

    """

    engine: Engine
    module: nn.Module

    def __init__(self, module: nn.Module, engine: Engine) -> None:
        super().__init__()
        self.module = module
        self.engine = engine

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        if not self.engine.is_compiled:
            self._note_compilation()
        with self.engine.forward_context():
            return self.module(*args, **kwargs)

    @torch.compiler.disable
    def _note_compilation(self) -> None:
        """Find out whether dynamo calls this object: Fabric compiles what wraps a compiled module, as users may."""
        self.engine.is_compiled = called_by_compiled_code()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of the user's module, which no engine trains."""
        return copy.deepcopy(self.module, memo)


class EngineSyncControl(_BackwardSyncControl):
    """``fabric.no_backward_sync`` of an :class:`EngineModule`."""

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Within it, rows whose gradients accumulate on each rank send nothing."""
        if not enabled:
            return nullcontext()
        if not isinstance(module, EngineModule):
            raise not_set_up(module)
        return module.engine.no_sync()


def not_set_up(module: nn.Module) -> TypeError:
    """What to raise for a module that ``fabric.no_backward_sync`` was given."""
    return TypeError(
        f"Expected the module that fabric.setup returned to fabric.no_backward_sync, got {type(module).__name__}."
    )


def without_module(optimizer: Optimizer, modules: int) -> ValueError:
    """What to raise for an optimizer whose parameters no module has.

    Args:
        optimizer: It was given to ``fabric.setup_optimizers``.
        modules: How many were set up.

    """
    return ValueError(
        f"Expected the parameters of {type(optimizer).__name__} to belong to a module that was set up, but none of"
        f" {modules} modules has them. Call fabric.setup(module, optimizer), or fabric.setup_module"
        " before fabric.setup_optimizers. One optimizer for several modules: set them up as one, such as"
        " torch.nn.ModuleDict({...})."
    )
