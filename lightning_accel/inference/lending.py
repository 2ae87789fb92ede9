"""Weights that a model has only while it uses them.

[Note: lent weights]
A module whose weights are kept elsewhere has parameters on the meta device. Before its forward each is replaced by a
copy on the device that computes, afterwards put back; so of all that is kept elsewhere no more than one module's is
there at a time. What is on disk is mapped: the kernel reads what is used, and drops it when memory is short.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_accel.core.checkpoint import StoredTensor


def read(source: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A copy of a tensor that is kept elsewhere.

    Args:
        source: In memory, mapped, or of a checkpoint.
        device: Where the copy is to be.
        dtype: Of the copy, if it is of floating point.

    """
    value = source.full() if isinstance(source, StoredTensor) else source.detach()
    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    return value.to(device, wanted, copy=not isinstance(source, StoredTensor))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module itself, by their names in it."""
    found = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Let a module have a tensor in the place of the one of that name."""
    if name in module._parameters:
        module._parameters[name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
    else:
        module._buffers[name] = value


class Lender:
    """Lends weights to the modules of one model. See [Note: lent weights].

    Args:
        kept: By their names in the model, where they are kept.
        device: Where they are needed.
        dtype: What those of floating point are converted to.

    """

    def __init__(self, kept: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None) -> None:
        self._kept = dict(kept)
        self._device = device
        self._dtype = dtype

    def attach(self, model: nn.Module, together: Collection[type[nn.Module]]) -> None:
        """Have modules borrow what is kept for them.

        Args:
            model: Its parameters that are kept are replaced by ones on the meta device.
            together: Classes of modules that use the weights of modules within them without calling these: they borrow
                for all of them.

        """
        covered: set[nn.Module] = set()
        classes = {cls for cls in map(type, model.modules()) if issubclass(cls, tuple(together))}
        for prefix, module in model.named_modules():
            if module in covered:
                continue
            parts = {inner: part for inner, part in module.named_modules() if not inner or type(module) in classes}
            covered.update(parts.values())
            places = []
            for inner, part in parts.items():
                for name, tensor in own_tensors(part).items():
                    full = ".".join(word for word in (prefix, inner, name) if word)
                    if full in self._kept:
                        empty = tensor.detach().to("meta")
                        put(part, name, empty)
                        places.append((part, name, full, own_tensors(part)[name]))
            if places:
                loan = _Loan(self, places)
                module.register_forward_pre_hook(loan.begin)
                module.register_forward_hook(loan.end, always_call=True)

    def value(self, name: str) -> Tensor:
        """A copy of a tensor, where it is needed."""
        return read(self._kept[name], self._device, self._dtype)


class _Loan:
    def __init__(self, lender: Lender, places: list[tuple[nn.Module, str, str, Tensor]]) -> None:
        self._lender = lender
        self._places = places
        self._depth = 0  # a module may be called within its own forward

    def begin(self, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            for module, name, full, _empty in self._places:
                put(module, name, self._lender.value(full))

    def end(self, *_: Any) -> None:
        if self._depth == 0:
            return  # what the user hung on the module before has raised, and nothing was lent
        self._depth -= 1
        if self._depth == 0:
            for module, name, _full, empty in self._places:
                put(module, name, empty)


def compute_on(module: nn.Module, device: torch.device) -> None:
    """Have what a module is called with moved to a device before."""

    def move(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), (args, kwargs))

    module.register_forward_pre_hook(move, with_kwargs=True)
