"""A model that DeepSpeed's engine trains, and as it was before once the engine is gone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.strategies.deepspeed_installed import import_deepspeed


class LentModel:
    """Remembers what a model was made of before an engine got it. What was made in parts stays so.

    Args:
        module: The model, whole.

    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = {
            parameter: (frozenset(vars(parameter)), parameter.dtype)
            for parameter in module.parameters()
            if not hasattr(parameter, "ds_id")
        }
        # By place: the hash of a metric changes with its state.
        self._parts = [(part, dict(part._modules), _numbers_of(part)) for part in module.modules()]
        self._buffers = {name: buffer.dtype for name, buffer in module.named_buffers()}

    def note_changes(self) -> None:
        """Call when the engine is there: AutoTP has divided numbers of heads and features, too, and marked modules."""
        for part, _, former in self._parts:
            for name, number in _numbers_of(part).items():
                if former.get(name) == number:
                    del former[name]
                else:
                    former.setdefault(name, None)

    def take_back(self, engine: Any, *, abandon: bool) -> None:
        """Make an end of an engine, and give the model its values, types and parameters again.

        Where the engine has fp32 master values, those are the values.

        Args:
            engine: DeepSpeed's.
            abandon: Other ranks may not answer any more: leave values as they are. If not, all ranks take part.

        """
        values = {} if abandon else self._whole_values()
        engine.destroy()
        check_of_inputs = getattr(engine, "first_dataloader_check", None)  # of AutoTP; gone after a first forward
        for handle in (engine.module_forward_pre_hook, engine.module_forward_post_hook, check_of_inputs):
            if handle is not None:
                handle.remove()
        for module in self._module.modules():
            if type(module._parameters) is not dict:
                vars(module)["_parameters"] = dict(module._parameters.items())
        for parameter, value in values.items():
            parameter.data = value
        if not abandon:
            self._join_tensors()
        for part, children, numbers in self._parts:
            part._modules = children
            for name, number in numbers.items():
                if number is None:
                    vars(part).pop(name, None)
                else:
                    vars(part)[name] = number
        vars(self._module).pop("universal_checkpoint_info", None)
        for parameter, (own, dtype) in self._parameters.items():
            parameter.grad = None
            for name in set(vars(parameter)) - own:
                delattr(parameter, name)
            if parameter in values:
                parameter.data = parameter.data.to(dtype)
        for name, buffer in self._module.named_buffers():
            buffer.data = buffer.data.to(self._buffers.get(name, buffer.dtype))
        _be_forgotten(self._module)

    def _join_tensors(self) -> None:
        """Have the layers that AutoTP has put in place of others join their tensors. All ranks take part."""
        layer: Any
        for layer in self._module.modules():
            if hasattr(layer, "gather_params") and getattr(layer, "tp_world_size", 1) > 1:
                layer.gather_params([layer.weight, getattr(layer, "bias", None)])

    @torch.no_grad()
    def _whole_values(self) -> dict[nn.Parameter, Tensor]:
        """Copies of all parameters; of those that AutoTP has divided, this rank's part. All ranks take part."""
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


@contextmanager
def joined_when_called(module: nn.Module, told: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """Within it a model that was made in parts can be evaluated: its parameters are joined when they are needed.

    Args:
        module: It rests in parts.
        told: DeepSpeed's configuration, of stage 3.
        device: What is computed on.

    """
    lent = LentModel(module)
    settings = {name: value for name, value in told.items() if name not in ("optimizer", "scheduler")}
    settings["zero_optimization"] = {**settings["zero_optimization"], "stage": 3}  # whatever the stage is now
    engine, *_ = import_deepspeed(device).initialize(
        args=None if device.index is None else argparse.Namespace(device_rank=device.index),
        model=module,
        config=settings,
        dist_init_required=False,
    )
    try:
        yield
    finally:
        lent.take_back(engine, abandon=True)  # values are what they were


def _numbers_of(module: nn.Module) -> dict[str, int | None]:
    return {name: value for name, value in vars(module).items() if isinstance(value, int) and name != "training"}


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
