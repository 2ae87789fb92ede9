"""fp8 in linear layers, by torchao."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

_CAPABILITY = (8, 9)  # Ada; then Hopper


def require_float8(config: Any, device: str | None, *, ask: bool = True) -> None:
    """Raise if linear layers cannot multiply in fp8 here.

    Args:
        config: True, or a ``torchao.float8.Float8LinearConfig``. One that emulates fp8 works on any device.
        device: The device's type; None if it is not known yet.
        ask: Whether the device may be asked what it can do. That starts CUDA, and processes cannot be forked then.

    Raises:
        ModuleNotFoundError: If torchao is not installed.
        ValueError: If the device has no fp8.

    """
    if find_spec("torchao") is None:
        raise ModuleNotFoundError(
            "Expected torchao to be installed for fp8, found none. Run: pip install 'lightning-accel[fp8]'"
        )
    if device is None or getattr(config, "emulate", False):
        return
    found = device
    if device == "cuda" and ask:
        capability = torch.cuda.get_device_capability()
        if capability >= _CAPABILITY:
            return
        found = f"{torch.cuda.get_device_name()} of capability {capability[0]}.{capability[1]}"
    elif device == "cuda":
        return
    raise ValueError(
        f"Expected a CUDA device of capability {_CAPABILITY[0]}.{_CAPABILITY[1]} or more (Ada, Hopper, …) for fp8,"
        f" got {found}. Use precision='bf16-mixed'."
    )


def with_float8(module: nn.Module, config: Any) -> nn.Module:
    """Have linear layers of a module multiply in fp8. Parameters stay the same objects, with the same names.

    Args:
        module: Changed in place, unless it is a linear layer itself.
        config: True, or a ``torchao.float8.Float8LinearConfig``.

    Returns:
        The module.

    """
    from torchao.float8 import convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    def is_wanted(part: Any, name: str) -> bool:
        # The hardware multiplies blocks of 16 numbers. What an earlier stage has converted stays.
        sizes = part.in_features, part.out_features
        return not isinstance(part, Float8Linear) and all(size % 16 == 0 for size in sizes)

    converted: nn.Module = convert_to_float8_training(
        module, module_filter_fn=is_wanted, config=None if config is True else config
    )
    return converted
