"""A model that DeepSpeed's engine trains, and as it was before once the engine is gone."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


class LentModel:
    """Remembers what a model was made of before an engine got it.

    Args:
        module: The model, whole.

    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = {
            parameter: (frozenset(vars(parameter)), parameter.dtype) for parameter in module.parameters()
        }
        self._buffers = {name: buffer.dtype for name, buffer in module.named_buffers()}

    def take_back(self, engine: Any, *, abandon: bool) -> None:
        """Make an end of an engine, and give the model its values, types and parameters again.

        Where the engine has fp32 master values, those are the values.

        Args:
            engine: DeepSpeed's.
            abandon: Other ranks may not answer any more: leave values as they are. If not, all ranks take part.

        """
        values = {} if abandon else self._whole_values()
        engine.destroy()
        for handle in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
            handle.remove()
        for module in self._module.modules():
            if type(module._parameters) is not dict:
                vars(module)["_parameters"] = dict(module._parameters.items())
        for parameter, (own, dtype) in self._parameters.items():
            parameter.grad = None
            for name in set(vars(parameter)) - own:
                delattr(parameter, name)
            if parameter in values:
                parameter.data = values[parameter].to(dtype)
        for name, buffer in self._module.named_buffers():
            buffer.data = buffer.data.to(self._buffers.get(name, buffer.dtype))
        _be_forgotten(self._module)

    @torch.no_grad()
    def _whole_values(self) -> dict[nn.Parameter, Tensor]:
        """Copies of all parameters. All ranks take part."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        values = {}
        for parameter in self._parameters:
            master = None
            if parameter.requires_grad and parameter.dtype is not torch.float32:
                master = safe_get_full_fp32_param(parameter)
            if master is None:
                with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    master = parameter.detach()
                    values[parameter] = master.clone()
            else:
                values[parameter] = master.view(getattr(parameter, "ds_shape", parameter.shape)).clone()
        return values


def _be_forgotten(model: nn.Module) -> None:
    """Take a model out of what stage 3 keeps for the life of the process: a LightningModule has its Trainer with it."""
    zero = "deepspeed.runtime.zero"  # a version without these lists has nothing to be taken out of
    modules = set(model.modules())
    stack = getattr(sys.modules.get(f"{zero}.parameter_offload"), "FWD_MODULE_STACK", [])
    stack[:] = [module for module in stack if module not in modules]
    coordinator = getattr(
        sys.modules.get(f"{zero}.partitioned_param_coordinator"), "PartitionedParameterCoordinator", None
    )
    for method in vars(coordinator).values() if coordinator is not None else ():
        for cell in getattr(method, "__closure__", None) or ():  # its caches are within a decorator
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()  # an engine that is still at work fills it again
