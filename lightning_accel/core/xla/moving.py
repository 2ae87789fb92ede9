"""A module's tensors between host memory and the devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_accel.core.xla.hosts import hosts


def replace_tensors(module: nn.Module, replacement: Callable[[Tensor], Tensor]) -> dict[Tensor, Tensor]:
    """Give a module other parameters and buffers. What was one tensor, under several names, stays one.

    Args:
        module: It is changed in place.
        replacement: Gives the values of a new parameter, or the new buffer.

    Returns:
        The new ones by the former.

    """
    found: dict[Tensor, Tensor] = {}

    def replaced(former: Tensor) -> Tensor:
        if former not in found:
            value = replacement(former)
            is_parameter = isinstance(former, nn.Parameter)
            found[former] = nn.Parameter(value, requires_grad=former.requires_grad) if is_parameter else value
        return found[former]

    for part in list(module.modules()):
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = replaced(tensor)  # type: ignore[assignment]
    return found


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Values in host memory, whole, however the devices divide them.

    What one host's devices divide is put together here: XLA would compile a program for each tensor, and need room for
    all of it on every device. That is what it does where parts are on other hosts; so all hosts take part.

    Args:
        tensors: Those that are on no XLA device are what is returned for them.

    """
    import torch_xla
    from torch_xla.core import xla_model

    away = [tensor.detach() for tensor in tensors if tensor.device.type == "xla"]
    if away:
        torch_xla.sync()  # or what is recorded would be compiled once more, for these values alone
        xla_model.wait_device_ops()
    is_here = not away or hosts().count == 1
    divided = [is_here and "devices=" in torch_xla._XLAC._get_xla_sharding_spec(tensor) for tensor in away]
    others = [tensor for tensor, is_divided in zip(away, divided, strict=True) if not is_divided]
    fetched = iter(torch_xla._XLAC._xla_get_cpu_tensors(others) if others else [])
    values = (
        _put_together(tensor) if is_divided else next(fetched) for tensor, is_divided in zip(away, divided, strict=True)
    )
    return [next(values) if tensor.device.type == "xla" else tensor for tensor in tensors]


def _put_together(tensor: Tensor) -> Tensor:
    import torch_xla

    parts = torch_xla._XLAC._get_local_shards([tensor])[0]
    places = torch_xla._XLAC._get_local_shard_replica_and_indices([tensor])[0]
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for (part, _), (_, place) in zip(parts, places, strict=True):
        if place is Ellipsis:
            whole.copy_(part)
        else:  # without its padding, which is at the end
            whole[tuple(place)] = part[tuple(slice(0, where.stop - where.start) for where in place)]
    return whole
