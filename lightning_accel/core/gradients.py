"""The reduced gradients of one optimizer, where they rest on this rank.

[Note: deferred factors]
Unscaling, clipping and averaging over weights multiply all gradients by one number each. Where gradients rest sharded
nobody sees their values between backward and step, so these numbers are multiplied with each other instead
(``Unit.factor``) and the product with the gradients at the step: within the optimizer's kernel if it is one of torch's
fused ones, which take a number to divide by; in one pass otherwise. Those who ask for values before that, or add to
them, find them multiplied. What unscaling and clipping want to know is read once: the 2-norm of a tensor is finite
unless an element is not, or its square is too large (then the elements are asked, too).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_pre_hooks
from typing_extensions import override

from lightning_accel.core.clipping import Gradients, all_finite, norms_of
from lightning_accel.core.placement import Rest
from lightning_accel.core.segment import Segment
from lightning_accel.core.unit import Content, Unit

if TYPE_CHECKING:
    from lightning_accel.core.optimizer import EngineOptimizer

_DIVIDING = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
"""Optimizers whose fused kernels divide gradients by an fp32 number, and write the quotients back."""
_MOST = 1e30
"""The largest factor or divisor that is left to a kernel. fp32, which it is in there, ends at 3e38."""


class RestingGradients(Gradients):
    """Reduced gradients as few 1-D tensors.

    Each element of each gradient is on one rank where optimizer state rests sharded, on every rank otherwise.

    Args:
        added: The optimizer.

    """

    def __init__(self, added: EngineOptimizer) -> None:
        self._added = added
        self.are_deferred = added.engine.row.gradients is Rest.SHARDED
        """Whether factors wait for the step. See [Note: deferred factors]."""
        self._read: tuple[Any, list[Tensor]] | None = None  # 2-norms, and of what
        self._divided: dict[Unit, None] = {}

    def _resting(self) -> list[tuple[Unit, Tensor]]:
        """What rests here, before factors.

        Raises:
            RuntimeError: If gradients were accumulated but not reduced.

        """
        units = self._added.units
        self._added.engine.before_step()
        for unit in units:
            unit.reconcile()
        self.require_reduced()
        for unit in units:
            unit.show()  # else the step would take over again what was assigned by hand, unclipped
        found = []
        for unit in units:
            labelled = [
                (0, piece) for piece in unit.layout.pieces(*unit.part) if unit.content[piece.slot] is Content.REDUCED
            ]
            found += [(unit, unit.local_gradient(start, stop)) for start, stop in Segment.ranges(labelled)]
        return found

    def require_reduced(self) -> None:
        """Raise if gradients were accumulated but not reduced, or not made the mean that weights of losses ask for.

        Raises:
            RuntimeError: Names the parameter.

        """
        self._added.window.require_mean(bool(self._added.used_units))
        for unit in self._added.units:
            for position, content in enumerate(unit.content):
                if content is Content.LOCAL or (content is Content.REDUCED and unit.is_inside):
                    raise RuntimeError(
                        f"Expected reduced gradients, but that of {unit.names[position]!r} was accumulated without"
                        " synchronisation (no_sync) only. Run the last backward before optimizer.step() or clipping"
                        " outside of no_sync."
                    )

    @override
    def tensors(self) -> list[Tensor]:
        """The gradients, to be looked at or changed.

        Raises:
            RuntimeError: If gradients were accumulated but not reduced.

        """
        found = self._resting()
        for unit in self._added.units:
            unit.apply_factor()
        self._read = None
        return [tensor for _, tensor in found]

    @override
    def norms(self, norm_type: float) -> list[Tensor]:
        found = self._resting()
        return [
            norm if unit.factor == 1.0 else norm * unit.factor
            for (unit, _), norm in zip(found, self._norms(found, norm_type), strict=True)
        ]

    def _norms(self, found: Sequence[tuple[Unit, Tensor]], norm_type: float) -> list[Tensor]:
        """Of what rests. Where it is not to be seen it is read again only if it has changed."""
        tensors = [tensor for _, tensor in found]
        if norm_type != 2.0 or not self.are_deferred:
            return norms_of(tensors, norm_type)
        places = [(u, u.edits, tensor.storage_offset(), tensor.numel(), tensor._version) for u, tensor in found]
        key = (self._added.engine.backwards, places)
        if self._read is None or self._read[0] != key:
            self._read = key, norms_of(tensors, 2.0)
        return self._read[1]

    @override
    def multiply(self, factor: float) -> None:
        if self.are_deferred:
            for unit in self._added.used_units:
                unit.factor *= factor
        elif tensors := self.tensors():
            torch._foreach_mul_(tensors, factor)

    def divide(self, divisor: float) -> bool:
        """Divide deferred gradients; whether all of this rank's were finite before."""
        found = self._resting()
        finite = all_finite(self._norms(found, 2.0)) or all(bool(torch.isfinite(tensor).all()) for _, tensor in found)
        self.multiply(1.0 / divisor)
        return finite

    # -------------------------------------------------------------------- step

    @contextmanager
    def multiplied(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Within it, a step of the user's optimizer on segments, in the groups that are shown, is one of the products.

        ``end_step`` must follow when all segments have had theirs.
        """
        units = {segment.unit: None for segment in segments}
        factors = {unit.factor for unit in units}
        if factors <= {1.0}:
            yield
            return
        if len(factors) > 1 or not self._kernel_divides(segments, next(iter(factors))):
            for unit in units:
                unit.apply_factor()
            yield
            return
        optimizer: Any = self._added.optimizer
        device = segments[0].tensor.device
        optimizer.grad_scale = torch.full((), 1.0 / factors.pop(), dtype=torch.float32, device=device)
        try:
            yield
        finally:
            del optimizer.grad_scale
        self._divided.update(units)

    def _kernel_divides(self, segments: Sequence[Segment], factor: float) -> bool:
        # In double precision the number's own rounding, to fp32, would show.
        precise = any(segment.tensor.dtype in (torch.float64, torch.complex128) for segment in segments)
        optimizer = self._added.optimizer
        fused = all(group.get("fused") for group in optimizer.param_groups)
        seen = optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks
        able = type(optimizer) in _DIVIDING and fused and not precise
        return bool(able and not seen and 1 / _MOST < factor < _MOST)

    def end_step(self) -> None:
        """Note that kernels have written their quotients."""
        for unit in self._divided:
            if not any(s.copies_gradient for s in self._added.segments if s.unit is unit):
                unit.factor = 1.0
        if self._divided:
            self._read = None
        self._divided.clear()
