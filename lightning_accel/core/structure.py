"""What the module looked like when it was set up, to tell when it was changed behind the engine's back."""

from __future__ import annotations

import os
import sys
from types import FrameType

import torch
from torch import Tensor, nn

from lightning_accel.core.absent import AbsentParameter

_COMPILED_CALL = "compile_wrapper", os.path.join("_dynamo", "eval_frame.py")


class Structure:
    """The parameters of a module tree and their names.

    Args:
        module: The root.

    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        """The first name of each parameter."""

    def require_unchanged(self, views: dict[nn.Parameter, Tensor]) -> None:
        """Raise if there is something to train that was not there at set-up; take back what was given other memory.

        Modules may be added, parameters renamed or taken out: what matters is that all that is trained is known.

        Args:
            views: The memory that parameters should have.

        Raises:
            RuntimeError: Names the parameter and what to do.

        """
        names = self.names
        seen = {self._module}
        parts = [self._module]
        while parts:  # before each forward: three times as fast as named_parameters()
            part = parts.pop()
            for parameter in part._parameters.values():
                if parameter is None:
                    continue
                view = views.get(parameter)
                if view is None:
                    if parameter.requires_grad and parameter not in names:
                        raise self._unknown(parameter)
                    continue
                # Of a parameter's class torch asks in Python: first the quick question.
                there = type(parameter) is nn.Parameter or not isinstance(parameter, AbsentParameter)
                if there and parameter.data_ptr() != view.data_ptr():
                    self._take_back(parameter, view)
            for child in part._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    parts.append(child)

    def _unknown(self, parameter: nn.Parameter) -> RuntimeError:
        name = next(name for name, found in self._module.named_parameters() if found is parameter)
        return RuntimeError(
            f"Expected the model to keep the parameters it was set up with, but {name!r} was added, or replaced by"
            " another object, since then: it would not be trained on all ranks. Create all parameters before the model"
            " is set up (in __init__, setup or configure_model), and change values in place (with torch.no_grad():"
            " parameter.copy_(...))."
        )

    def _take_back(self, parameter: nn.Parameter, view: Tensor) -> None:
        """Have new values where they belong, which came by ``parameter.data = ...``."""
        if (parameter.shape, parameter.dtype, parameter.device) != (view.shape, view.dtype, view.device):
            raise RuntimeError(
                f"Expected {self.names[parameter]!r} to stay {view.dtype} of shape {tuple(view.shape)} on"
                f" {view.device}, but it is {parameter.dtype} of shape {tuple(parameter.shape)} on {parameter.device}"
                " now (by parameter.data = ..., module.to(...), .half() or the like). Do that before the model is set"
                " up."
            )
        with torch.no_grad():
            view.copy_(parameter)
            parameter.data = view


def is_compiled(module: nn.Module) -> bool:
    """Whether any part of a module runs compiled or scripted: such code does not see what class a parameter has."""
    return getattr(module, "_compiler_ctx", None) is not None or any(
        hasattr(part, "_orig_mod")
        or getattr(part, "_compiled_call_impl", None) is not None
        or isinstance(part, torch.jit.ScriptModule)
        for part in module.modules()
    )


def called_by_compiled_code() -> bool:
    """Whether the caller is called, however indirectly, by what ``torch.compile`` returned."""
    name, file = _COMPILED_CALL
    frame: FrameType | None = sys._getframe()
    while frame is not None:  # often, and through all of Lightning: names first
        if frame.f_code.co_name == name and frame.f_code.co_filename.endswith(file):
            return True
        frame = frame.f_back
    return False
