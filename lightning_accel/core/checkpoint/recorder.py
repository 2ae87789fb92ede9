"""Finds out what a module's ``load_state_dict`` would copy where, without copying anything.

While it runs, parameters and buffers have stand-ins, which note what is copied into them. So names are changed, keys
are checked and shapes compared by the module's own code and hooks, whatever these are; only the values wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Copies = list[tuple[Tensor, Tensor]]
"""Parameters and buffers, and what is to be copied into them, in order."""


class _StandIn(Tensor):
    """Has a tensor's shape, dtype and device."""

    _original: Tensor
    _copies: Copies

    @staticmethod
    def __new__(cls, original: Tensor, copies: Copies) -> _StandIn:
        made = Tensor._make_wrapper_subclass(cls, original.shape, dtype=original.dtype, device=original.device)
        made._original = original
        made._copies = copies
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        first = args[0]
        if func is torch.ops.aten.copy_.default and isinstance(first, _StandIn):
            source = args[1]
            first._copies.append((first._original, source._original if isinstance(source, _StandIn) else source))
            return first
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return first
        raise NotImplementedError(
            f"Expected load_state_dict of the model to copy values into parameters and buffers, but it wants {func} of"
            " one. Do that in on_load_checkpoint, with the values of the checkpoint."
        )


@contextmanager
def recorded(module: nn.Module) -> Iterator[Copies]:
    """Within it, what is copied into the module's parameters and buffers is noted instead."""
    copies: Copies = []
    stand_ins: dict[Tensor, _StandIn] = {}
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for part in module.modules():
            both: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for entries in both:
                for name, tensor in list(entries.items()):
                    if tensor is not None and not nn.parameter.is_lazy(tensor):
                        changed.append((entries, name, tensor))
                        entries[name] = stand_ins.setdefault(tensor, _StandIn(tensor, copies))
        yield copies
    finally:
        for entries, name, tensor in changed:
            entries[name] = tensor
