"""What a loop of the user's own cannot have of a model and an optimizer that DeepSpeed's engine has: errors say so.

With the Trainer such calls come through Lightning. With Fabric they reach the model and the optimizer themselves, which
would do something else than what is asked for: the values that DeepSpeed updates are not those that ``load_state_dict``
writes, and at stage 3 parameters are empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.strategies.deepspeed_run import RunningEngine


class Watch:
    """Has a model and its optimizer refuse what would not do what it says, and round the model's inputs.

    Args:
        run: The engine that has them.
        is_divided: Whether parameters rest in parts.
        rounded: Converts what the model is called with.

    """

    def __init__(self, run: RunningEngine, *, is_divided: bool, rounded: Callable[[Any], Any]) -> None:
        self.run = run
        """The engine."""

        def convert(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return rounded((args, kwargs))

        def refuse_saving(*_: Any) -> None:
            if not run.is_at_work:
                raise _state_of_engine("model.state_dict()", "each rank has a part of every parameter")

        def refuse_loading(*_: Any) -> None:
            if not run.is_at_work:
                raise _state_of_engine(
                    "model.load_state_dict()", "it updates values of its own. Load weights before fabric.setup"
                )

        module = run.module
        self._handles = [
            module.register_forward_pre_hook(convert, with_kwargs=True),
            module.register_load_state_dict_pre_hook(refuse_loading),
        ]
        if is_divided:
            self._handles.append(module.register_state_dict_pre_hook(refuse_saving))
        # It stays an optimizer of its class, for schedules and whoever asks.
        self._kind = kind = type(run.optimizer)
        run.optimizer.run = run  # type: ignore[attr-defined]
        run.optimizer.__class__ = type(kind.__name__, (_Watched, kind), {"__module__": kind.__module__})

    def end(self) -> None:
        """Have both be as they were."""
        for handle in self._handles:
            handle.remove()
        optimizer = self.run.optimizer
        optimizer.__class__ = self._kind
        del optimizer.__dict__["run"]


class _Watched(Optimizer):
    run: RunningEngine

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        # Fabric's wrapper has methods of this class, and not those of the optimizer that it wraps.
        if self.run.is_at_work:
            super().zero_grad(set_to_none)
        else:
            self.run.require_no_gradients()

    @override
    def load_state_dict(self, state_dict: Any) -> None:
        if not self.run.is_at_work:
            raise state_of_optimizer("optimizer.load_state_dict()")
        super().load_state_dict(state_dict)


def run_of(optimizer: Any) -> RunningEngine | None:
    """The engine that an optimizer is in, if any."""
    return optimizer.run if isinstance(optimizer, _Watched) else None


def state_of_optimizer(call: str) -> ValueError:
    """The error of asking an optimizer for its state.

    Args:
        call: What was called.

    """
    return _state_of_engine(call, "it has the optimizer's state in flat parts")


def _state_of_engine(call: str, reason: str) -> ValueError:
    return ValueError(
        f"Expected fabric.save and fabric.load with strategy='accel_deepspeed' once DeepSpeed's engine has the model,"
        f" got {call}: {reason}."
    )
