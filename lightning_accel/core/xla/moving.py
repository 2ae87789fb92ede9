"""A module's tensors between host memory and the devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


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
    """Values in host memory, whole, however the devices divide them. All are fetched together.

    Args:
        tensors: Those that are on no XLA device are what is returned for them.

    """
    import torch_xla

    away = [tensor.detach() for tensor in tensors if tensor.device.type == "xla"]
    if away:
        torch_xla.sync()  # or what is recorded would be compiled once more, for these values alone
    fetched = iter(torch_xla._XLAC._xla_get_cpu_tensors(away) if away else [])
    return [next(fetched) if tensor.device.type == "xla" else tensor for tensor in tensors]
