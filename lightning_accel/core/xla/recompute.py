"""Activation checkpointing on XLA devices: a module's activations are computed again in backward.

[Note: behind a barrier]
A step is one program, in which what is computed again is the same expression as what forward has computed: the compiler
finds that out, computes it once and keeps it. So what goes into the second computation are copies behind an
optimization barrier, through which the compiler does not look: the module's input, and the parameters as they rest, so
that those are gathered again, too, and forward's whole copies are not kept. The gradient of the module's output goes
through the same barrier: nothing is computed again before it is there.

torch_xla has a checkpoint function with such a barrier, which runs forward without a graph. Lists, dictionaries and
keyword arguments would have no gradients under it, and what it computes again would not be within the hooks that
gather parameters. So the graph is kept as torch's own checkpoint keeps it, and the barrier is added.

[Note: random numbers]
The state of the devices' generator is a number that is known in host memory. It is that of forward while a module
computes again, and then what it was before. As setting it begins another sequence, the steps after the first draw
others than they would without checkpointing.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_accel.core.recompute import Recomputing
from lightning_accel.core.xla.gathering import Unit


def recompute_on_devices(units: Iterable[tuple[nn.Module, Unit | None]]) -> Callable[[], None]:
    """Have modules compute their activations again in backward, in training and where gradients are on.

    Args:
        units: The modules, on the devices; with each what gathers its parameters, if they rest sharded and its own
            modules do not do so themselves.

    Returns:
        A function that takes it back.

    """
    replaced = [_RecomputedOnDevices(module, unit) for module, unit in units]

    def undo() -> None:
        for forward in replaced:
            forward.remove()

    return undo


class _RecomputedOnDevices(Recomputing):
    def __init__(self, module: nn.Module, unit: Unit | None) -> None:
        super().__init__(module, {})
        self._unit = unit

    @override
    def _kept(self, args: Any, kwargs: Any) -> list[Tensor]:
        parameters = self._module.parameters() if self._unit is None else self._unit.parts
        return [*parameters, *_on_devices(tree_flatten((args, kwargs))[0])]

    @override
    def _checkpointed(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = _Call(function, self._unit, args, kwargs)
        # torch does not know how to ask this kind of device for the state of its generator, so it is shown no tensors.
        leaves, structure = tree_flatten(checkpoint(call, use_reentrant=False))
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        outputs = _Arrival.apply(weakref.ref(call), *(leaves[place] for place in places))  # type: ignore[no-untyped-call]
        for place, output in zip(places, outputs, strict=True):
            leaves[place] = output
        return tree_unflatten(leaves, structure)


class _Call:
    """One forward of a module; called once more, it computes again. See [Note: behind a barrier].

    torch keeps it as long as there may be a backward. Nothing else may: it has the module's input.
    """

    def __init__(self, function: Callable[..., Any], unit: Unit | None, args: Any, kwargs: Any) -> None:
        from torch_xla.core import xla_model

        self._function = function
        self._unit = unit
        self._leaves, self._structure = tree_flatten((args, kwargs))
        self._copies: list[Tensor] | None = None
        self._seed = xla_model.get_rng_state()
        self._autocast = torch.is_autocast_enabled("xla")
        self._dtype = torch.get_autocast_dtype("xla")
        self._caches = torch.is_autocast_cache_enabled()
        self._is_forward = True

    def hide(self, gradients: Sequence[Tensor]) -> None:
        """Copy what the computation starts from behind a barrier, together with gradients (in place)."""
        from torch_xla.core import xla_model

        originals = self._originals()
        with torch.no_grad():
            self._copies = [original.clone() for original in originals]
        xla_model.optimization_barrier_([*self._copies, *gradients])
        for copy, original in zip(self._copies, originals, strict=True):
            copy.requires_grad_(original.requires_grad)

    def _originals(self) -> list[Tensor]:
        return [*_on_devices(self._leaves), *(self._unit.parts if self._unit is not None else ())]

    def __call__(self) -> Any:
        from torch_xla.core import xla_model

        if self._is_forward:
            self._is_forward = False
            args, kwargs = tree_unflatten(self._leaves, self._structure)
            return self._function(*args, **kwargs)
        if self._copies is None:  # none of the outputs was found
            self.hide([])
        assert self._copies is not None
        copies, self._copies = iter(self._copies), None
        leaves = [next(copies) if _is_on_devices(leaf) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._structure)
        gathered = contextlib.nullcontext() if self._unit is None else self._unit.filled(list(copies))
        autocast = torch.autocast("xla", self._dtype, enabled=self._autocast, cache_enabled=self._caches)
        with xla_model.fork_rng(), autocast, gathered:
            xla_model.set_rng_state(self._seed)  # see [Note: random numbers]
            return self._function(*args, **kwargs)


class _Arrival(torch.autograd.Function):
    """The outputs of a module, whose gradients go through the barrier of its call."""

    @staticmethod
    @override
    def forward(ctx: Any, call: weakref.ref[_Call], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        return tuple(output.clone() for output in outputs)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call, arrived = ctx.call(), [None if gradient is None else gradient.clone() for gradient in gradients]
        if call is not None:
            call.hide([gradient for gradient in arrived if gradient is not None])
        return None, *arrived


def _is_on_devices(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "xla"


def _on_devices(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if _is_on_devices(value)]
