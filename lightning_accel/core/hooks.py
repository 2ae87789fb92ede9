"""What an engine hangs on the user's module and parameters.

Weakly: torch keeps these hooks where gc cannot follow, and would keep what they refer to for ever.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_accel.core.module_hook import Hook

if TYPE_CHECKING:
    from lightning_accel.core.engine import Engine


class GradientHooks:
    """Tells an engine of gradients that arrive.

    Args:
        engine: Whose ``gradient_arrived`` is called.

    """

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._hooks: dict[nn.Parameter, RemovableHandle] = {}

    def attach(self, parameters: Collection[nn.Parameter]) -> None:
        """Tell of these parameters' gradients from now on, if they require any, and of no others'."""
        current = set(parameters)
        for parameter in [p for p in self._hooks if p not in current]:
            self._hooks.pop(parameter).remove()
        for parameter in parameters:
            if parameter.requires_grad and parameter not in self._hooks:
                self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(_gradient_arrived, self._engine)
                )

    def remove(self) -> None:
        """Tell of none."""
        self.attach(())


def hang_on_module(engine: Engine) -> None:
    """Have what the first forward computes with be rounded already, even if nobody has announced it."""
    reference = weakref.ref(engine)
    for hook in (
        engine.module.register_forward_pre_hook(Hook(partial(_before_forward, reference)), prepend=True),
        engine.module.register_state_dict_pre_hook(Hook(partial(_warn_of_rounded, reference))),  # type: ignore[no-untyped-call]
    ):
        engine.at_close.callback(hook.remove)


def _gradient_arrived(engine: weakref.ref[Engine], parameter: nn.Parameter) -> None:
    found = engine()
    if found is None:
        raise RuntimeError(
            "Expected the engine of a model that is trained to be kept, but nothing refers to it any more. Keep the"
            " engine, an optimizer that was given to it, or what fabric.setup returned."
        )
    found.gradient_arrived(parameter)


def _before_forward(reference: weakref.ref[Engine], *_: Any) -> None:
    engine = reference()
    if engine is not None:
        engine.before_forward()


def _warn_of_rounded(reference: weakref.ref[Engine], _: nn.Module, prefix: str, keep_vars: bool) -> None:
    engine = reference()
    if engine is None or keep_vars:  # who asks for the parameters themselves, as the checkpoints do, has their names
        return
    if any(u.memory.has_master and any(p.dtype != u.memory.master_dtype for p in u.parameters) for u in engine.units):
        warnings.warn(
            "state_dict() has the values that mixed precision computes with, rounded to 16 bits. To save precise ones"
            " call it, on every rank, within `with engine.full_parameters():` (the engine is trainer.strategy.engine,"
            " or lightning_accel.engine_of(model)), or use trainer.save_checkpoint(...) or fabric.save(...).",
            stacklevel=4,
        )
