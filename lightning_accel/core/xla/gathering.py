"""Parameters that rest sharded are gathered where their unit is computed.

[Note: gathered where it is used]
Left alone, XLA's partitioner decides for each product whether to gather the parameter or the activations, and finds
either by what the product costs by itself. Here a unit's forward computes with copies that are annotated as whole, so
that it is parameters that travel. Whether forward's copy is kept until backward, or made again, is for the compiler to
decide by the memory there is; so rows that differ in nothing else (``fsdp``, ``fsdp_partial``) are one row here.
Gradients of a unit leave behind one optimization barrier, so that the reductions of several units are not merged
into one that needs room for all of them (the same end that torch_xla's SpmdFullyShardedDataParallel has its own for).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_accel.core.partition import Units, find_blocks
from lightning_accel.core.xla.placing import Placing
from lightning_accel.core.xla.shardings import replicated


class _Whole(torch.autograd.Function):
    """Parameters of one unit, as whole copies."""

    @staticmethod
    @override
    def forward(ctx: Any, placing: Placing, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.placing = placing
        ctx.set_materialize_grads(False)  # what was not used has no gradient
        return tuple(placing.annotate(part.clone(), replicated(part.shape)) for part in parts)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        from torch_xla.core import xla_model

        # Whole here, and cut only where they rest: were they cut at once, the partitioner would compute each part of a
        # product by itself, and gather the activations of all samples for it.
        arrived = [
            None if gradient is None else ctx.placing.annotate(gradient.clone(), replicated(gradient.shape))
            for gradient in gradients
        ]
        xla_model.optimization_barrier_([gradient for gradient in arrived if gradient is not None])
        return None, *arrived


class Unit:
    """Modules whose parameters are gathered together while one of them, which has the others in it, computes.

    Args:
        placing: The devices.
        owners: The modules.

    """

    def __init__(self, placing: Placing, owners: Iterable[nn.Module]) -> None:
        self._placing = placing
        self._places = [
            (owner, name, parameter)
            for owner in owners
            for name, parameter in owner._parameters.items()
            if parameter is not None
        ]
        self.parts = list(dict.fromkeys(parameter for _, _, parameter in self._places))
        """The parameters as they rest."""
        self._depth = 0

    def enter(self, module: nn.Module, args: Any) -> None:
        """A hook before the forward of a module."""
        self._depth += 1
        if self._depth == 1:
            self._fill(self.parts)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook after it."""
        self._depth -= 1
        if self._depth == 0:
            self._empty()

    @contextmanager
    def filled(self, parts: Sequence[Tensor]) -> Iterator[None]:
        """Within it, the modules compute with what is gathered of these, which have the values of ``parts``."""
        self._fill(parts)
        try:
            yield
        finally:
            self._empty()

    def _fill(self, parts: Sequence[Tensor]) -> None:
        gathered = _Whole.apply(self._placing, *parts)  # type: ignore[no-untyped-call]
        whole = dict(zip(self.parts, gathered, strict=True))
        for owner, name, parameter in self._places:
            owner._parameters[name] = whole[parameter]

    def _empty(self) -> None:
        for owner, name, parameter in self._places:
            owner._parameters[name] = parameter


def gather_in_units(module: nn.Module, units: Units | None, placing: Placing) -> Callable[[], None]:
    """Have every unit compute with whole parameters: each block, and each other module that has parameters.

    Args:
        module: The model, on the devices.
        units: As for ``Engine``.
        placing: The devices.

    Returns:
        Takes it back.

    Raises:
        ValueError: If a unit does not exist.

    """
    roots = dict.fromkeys(find_blocks(module, units).values())
    inside = {part for root in roots for part in root.modules()}
    owners = {root: list(root.modules()) for root in roots}
    owners |= {part: [part] for part in module.modules() if part not in inside}
    handles = []
    for root, parts in owners.items():
        if any(parameter is not None for part in parts for parameter in part._parameters.values()):
            unit = Unit(placing, parts)
            handles.append(root.register_forward_pre_hook(unit.enter, prepend=True))
            handles.append(root.register_forward_hook(unit.leave, always_call=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
