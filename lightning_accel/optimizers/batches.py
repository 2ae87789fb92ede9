"""What optimizers here have in common: which parameters are updated by one call, and which settings make sense."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from torch import Tensor


def batches(parameters: Iterable[Tensor], key: Callable[[Tensor], Hashable]) -> list[list[Tensor]]:
    """Those parameters that have a gradient, by which of them one call of torch's foreach functions can update.

    On the CPU these functions are loops over tensors, so that each tensor goes by itself there: what is computed on the
    way then takes the memory of one tensor instead of all.

    Args:
        parameters: Of one parameter group.
        key: What must be equal besides device and dtypes.

    Raises:
        ValueError: If a parameter is complex, or a gradient sparse.

    """
    alone: list[list[Tensor]] = []
    alike: dict[Hashable, list[Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            raise ValueError("Expected dense gradients, got a sparse one. Use Embedding(sparse=False).")
        if parameter.is_complex():
            raise ValueError(f"Expected real parameters, got one of {parameter.dtype}. Use torch.optim.AdamW for it.")
        if parameter.device.type == "cpu":
            alone.append([parameter])
        else:
            kind = (parameter.device, parameter.dtype, gradient.dtype, key(parameter))
            alike.setdefault(kind, []).append(parameter)
    return [*alone, *alike.values()]


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def require_number(name: str, value: Any, low: float = 0.0) -> None:
    """Raise unless a setting is a finite number of at least ``low``.

    Raises:
        ValueError: If it is not.

    """
    if isinstance(value, bool | str | bytes | None) or not _is_finite(value) or value < low:
        raise ValueError(f"Expected {name} to be a number of at least {low:g}, got {value!r}.")


def require_common(group: Mapping[str, Any]) -> None:
    """Check the settings that all optimizers here have.

    Args:
        group: A parameter group with all its settings.

    Raises:
        ValueError: If ``lr``, ``betas`` or ``weight_decay`` is out of range.

    """
    require_number("lr", group["lr"])
    require_number("weight_decay", group["weight_decay"])
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"Expected betas to be two numbers, got {betas!r}.")
    for index, beta in enumerate(betas):
        require_number(f"betas[{index}]", beta)
        if beta >= 1:
            raise ValueError(f"Expected betas[{index}] to be below 1, got {beta!r}.")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        return False
