"""Finds out what a module's ``load_state_dict`` would copy where, without copying anything.

While it runs, parameters and buffers have stand-ins, which note what is copied into them. So names are changed, keys
are checked and shapes compared by the module's own code and hooks, whatever these are; only the values wait. So does
extra state, which modules take in by a method of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_EXTRA = "set_extra_state"

Copies = list[tuple[Tensor, Tensor]]
"""Parameters and buffers, and what is to be copied into them, in order."""


@dataclass
class Recorded:
    """What a module's ``load_state_dict`` would change."""

    copies: Copies = field(default_factory=list)
    extra: list[tuple[nn.Module, Any]] = field(default_factory=list)
    """Modules, and what their ``set_extra_state`` is to be called with."""


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
def recorded(module: nn.Module) -> Iterator[Recorded]:
    """Within it, what would be changed is noted instead."""
    found = Recorded()
    stand_ins: dict[Tensor, _StandIn] = {}
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    silenced: list[nn.Module] = []
    try:
        for part in module.modules():
            both: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for entries in both:
                for name, tensor in list(entries.items()):
                    if tensor is not None and not nn.parameter.is_lazy(tensor):
                        changed.append((entries, name, tensor))
                        entries[name] = stand_ins.setdefault(tensor, _StandIn(tensor, found.copies))
            if type(part).set_extra_state is not nn.Module.set_extra_state and _EXTRA not in vars(part):
                silenced.append(part)
                vars(part)[_EXTRA] = partial(_note, found, part)
        yield found
    finally:
        for entries, name, tensor in changed:
            entries[name] = tensor
        for part in silenced:
            del vars(part)[_EXTRA]


def is_recorded(module: nn.Module) -> bool:
    """Whether this is within ``recorded``: for hooks that are called as if values had been loaded."""
    return any(isinstance(tensor, _StandIn) for tensor in (*module.parameters(), *module.buffers()))


def _note(found: Recorded, part: nn.Module, state: Any) -> None:
    found.extra.append((part, state))
