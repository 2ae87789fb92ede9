"""Operations on fake tensors that were carried out before, once more and faster.

[Note: shortcuts]
torch takes a quarter of a millisecond for an operation on fake tensors, and a simulation is tens of thousands of them,
a few hundred of which differ. What an operation makes of tensors without values follows from their shapes, strides and
dtypes; so from the second time on the result is made directly, as torch's own cache of such operations does at the end
of its many checks: the input itself, another look at an input's memory, or new memory.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

_UNSAFE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
"""What depends on values, or changes what its input is."""
_DEVICE = torch.ops.prim.device.default
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


@dataclass(frozen=True, slots=True)
class _Same:
    """The result is an input."""

    index: int

    def make(self, tensors: list[FakeTensor]) -> Tensor:
        return tensors[self.index]


@dataclass(frozen=True, slots=True)
class _Made:
    """The result is a tensor of its own, in an input's memory or in new."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int
    index: int | None
    """Of the input whose memory it is in."""

    def make(self, tensors: list[FakeTensor]) -> Tensor:
        mode = tensors[0].fake_mode
        if self.index is None:
            with in_kernel_invocation_manager(mode):
                made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        else:
            storage = tensors[self.index].untyped_storage()
            with in_kernel_invocation_manager(mode):
                made = torch.empty(0, dtype=self.dtype, device="meta")
                made.set_(storage, self.offset, self.shape, self.stride)
        return FakeTensor(mode, made, self.device)


class Shortcuts:
    """Carries operations out. See [Note: shortcuts]."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Same | _Made | None] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry an operation out, with whatever mode there is for fake tensors."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # two of three calls: the dispatcher asks for it
            return args[0].fake_device
        tensors: list[FakeTensor] = []
        key = _key(func, args, kwargs, tensors)
        if key is None:
            return func(*args, **kwargs)
        known = self._known.get(key)
        if known is not None:
            return known.make(tensors)
        result = func(*args, **kwargs)
        if key not in self._known:
            self._known[key] = _how(result, tensors)
        return result


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[FakeTensor]) -> Hashable:
    """What the result follows from, and the tensors among it; None if that is not all."""
    if not _may_be_shortened(func):
        return None
    found: list[Any] = [func]
    if not _add(args, found, tensors):
        return None
    for name, value in kwargs.items():
        found.append(name)
        if not _add((value,), found, tensors):
            return None
    return tuple(found) if tensors else None


@cache
def _may_be_shortened(func: Any) -> bool:
    if type(func) is not OpOverload or func.namespace != "aten" or not _UNSAFE.isdisjoint(func.tags):
        return False
    return not any(argument.is_out for argument in func._schema.arguments)  # which are given another size if need be


def _add(values: Any, found: list[Any], tensors: list[FakeTensor]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if not isinstance(value, FakeTensor) or value.constant is not None or value.layout is not torch.strided:
                return False
            if value.dtype.is_complex:
                return False
            tensors.append(value)
            found.append((value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device))
        elif isinstance(value, list | tuple):
            found.append(len(value))
            if not _add(value, found, tensors):
                return False
        elif isinstance(value, _PLAIN):
            found.append((type(value), value))  # 1, 1.0 and True are equal, but make different things
        else:
            return False
    return True


def _how(result: Any, tensors: list[FakeTensor]) -> _Same | _Made | None:
    """How to make a result again; None if that cannot be said."""
    for position, tensor in enumerate(tensors):
        if result is tensor:
            return _Same(position)
    if not isinstance(result, FakeTensor) or result.constant is not None or result.layout is not torch.strided:
        return None
    memory = result.untyped_storage()._cdata
    index = next((i for i, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == memory), None)
    return _Made(
        tuple(result.shape), result.stride(), result.dtype, result.fake_device, int(result.storage_offset()), index
    )
