"""Loss scaling for every row: fp16 gradients that would underflow are kept, and steps that overflowed are skipped.

::

    scale      loss times the scale
    backward   gradients times the scale are reduced
    unscale_   one pass over this rank's few flat gradients finds Inf and NaN, and the norm that clipping wants;
               one number travels: did any rank find one? They are divided at the step, see core/gradients.py
    step       skipped on all ranks, or on none
    update     a new scale, from verdicts that all ranks share

[Note: the verdict]
It is the ranks' common one even where all ranks hold the same gradients: a single rank that stepped while the others
skipped would go unnoticed until its parameters are compared. Whether a gradient overflowed is asked of each element,
not of a norm, whose sum of squares may overflow while no element does.

[Note: when a verdict ends]
torch forgets about all optimizers at ``update``. Lightning calls that after each optimizer's step, so gradients that
were unscaled for clipping but belong to an optimizer that steps later would be divided twice. Here an optimizer's
verdict lasts until it has stepped or there was another backward; the scale follows each verdict once. A common verdict
lasts until all of its optimizers have stepped, and the scale follows then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.core.loss_scale import LossScale, find_rule
from lightning_accel.core.optimizer import EngineOptimizer


@dataclass
class _Checked:
    """What is known of an optimizer's gradients."""

    overflow: bool
    backwards: int | None
    """The engine's count of backwards when they were looked at."""
    stepped: bool = False
    counted: bool = False
    """Whether the scale has followed."""


class Surroundings:
    """What a scaler has to know of the devices. Others than torch's own kind have one of their own."""

    def number(self, value: float, device: torch.device) -> Tensor:
        """A number on a device, in fp32, which has room for it, whatever the default dtype is just now."""
        return torch.full((), value, dtype=torch.float32, device=device)

    def read(self, verdict: Tensor) -> bool:
        """The value of a tensor of one element."""
        return bool(verdict)

    def backwards(self, optimizer: Optimizer) -> int | None:
        """How many backwards there were, for an optimizer that no ``Engine`` has; None if nobody counts."""
        return None


class GradScaler:
    """Scales losses and unscales gradients, with the methods of ``torch.amp.GradScaler``, under every placement row.

    Optimizers that no engine has work as well; their verdict is this process's own.

    Args:
        rule: How the scale changes: ``"torch"``, ``"deepspeed"`` or ``"static"``.
        common_verdict: With several optimizers, skip all of their steps if one of them must be skipped. ``unscale_``
            (or clipping by Lightning, which does it) must then be called for each before the first ``step``, and each
            must step. By default, as with torch, each optimizer has a
            verdict of its own.
        enabled: If False, every method does nothing or passes on what it was given.
        settings: Fields of :class:`~lightning_accel.core.loss_scale.ScaleRule` that are to differ from the rule's own:
            ``init_scale``, ``growth_factor``, ``backoff_factor``, ``growth_interval``, ``hysteresis``,
            ``consecutive_hysteresis``, ``min_scale``, ``raise_at_min_scale``.

    Raises:
        ValueError: If there is no such rule, or a setting is out of range or without effect.
        TypeError: If a setting does not exist.

    Example::

        scaler = GradScaler(rule="deepspeed", hysteresis=2)
        with torch.autocast("cuda", torch.float16):
            loss = module(batch)
        engine.backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        engine.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()

    """

    def __init__(
        self, rule: str = "torch", *, common_verdict: bool = False, enabled: bool = True, **settings: Any
    ) -> None:
        self._scale = LossScale(find_rule(rule, **settings))
        self._common_verdict = common_verdict
        self._enabled = enabled
        self._checked: dict[EngineOptimizer | Optimizer, _Checked] = {}
        self.surroundings = Surroundings()
        """How it deals with the devices."""
        self.skipped_steps = 0
        """How many optimizer steps were skipped."""

    @classmethod
    def like(cls, scaler: torch.amp.GradScaler) -> GradScaler:
        """A scaler with the settings and the state of one of torch's."""
        if not scaler.is_enabled():
            return cls(enabled=False)
        made = cls(init_scale=scaler.get_scale())
        made.load_state_dict(scaler.state_dict())
        return made

    def is_enabled(self) -> bool:
        """Whether it does anything."""
        return self._enabled

    def get_scale(self) -> float:
        """The scale; 1.0 if not enabled."""
        return self._scale.value if self._enabled else 1.0

    # -------------------------------------------------------------------- step

    @overload
    def scale(self, outputs: Tensor) -> Tensor: ...

    @overload
    def scale(self, outputs: Iterable[Any]) -> Iterable[Any]: ...

    def scale(self, outputs: Tensor | Iterable[Any]) -> Tensor | Iterable[Any]:
        """Tensors times the scale.

        Args:
            outputs: A tensor of any shape, or tensors in lists, tuples and other iterables.

        Returns:
            The same structure. A 0-dim fp16 tensor becomes fp32, which has room for the scale.

        Raises:
            TypeError: If something is neither a tensor nor iterable.

        """
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            return outputs * self.surroundings.number(self._scale.value, outputs.device)
        if isinstance(outputs, (list, tuple)):
            return type(outputs)(map(self.scale, outputs))
        if isinstance(outputs, Iterable):
            return map(self.scale, outputs)
        raise TypeError(f"Expected a tensor or an iterable of tensors to scale, got {type(outputs).__name__}.")

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide an optimizer's gradients by the scale and find out whether all are finite. For all ranks, together.

        Optional: ``step`` does it otherwise. Before it, gradients are the scaled ones wherever they are looked at.
        Doing it again before the next backward changes nothing. See [Note: when a verdict ends].

        Raises:
            RuntimeError: If it was done since the last ``update`` already and new gradients were added since, or
                another optimizer has stepped that is to have a common verdict with this one.
            ValueError: If gradients are fp16, which cannot hold what is divided, or sparse.

        """
        if not self._enabled:
            return
        side = _side(optimizer)
        backwards = side.engine.backwards if isinstance(side, EngineOptimizer) else self.surroundings.backwards(side)
        known = self._checked.get(side)
        if known is not None and backwards is not None and known.backwards == backwards and not known.stepped:
            return
        if known is not None and not known.counted:
            raise RuntimeError(
                "Expected gradients that are scaled still, but unscale_() was called for this optimizer already since"
                " the last update(). Call it once for each step, after the last backward."
            )
        if self._common_verdict and any(checked.stepped for checked in self._checked.values()):
            raise RuntimeError(
                "Expected the gradients of all optimizers before the first of them steps, because their verdict is a"
                " common one. Call scaler.unscale_(optimizer) for each before the first scaler.step(...), or set"
                " common_verdict=False."
            )
        if isinstance(side, EngineOptimizer):
            if side.engine.compression is not None:
                side.engine.compression.note_scale(side.parameters(), self.get_scale)
            world = side.engine.mesh.world
            found = torch.full((1,), self._divide(side), dtype=torch.float32, device=world.device)
            overflow = bool(world.sum_scalar(found, maximum=True))  # see [Note: the verdict]
            side.overflowed = overflow
        else:
            shown = [p.grad for group in side.param_groups for p in group["params"] if p.grad is not None]
            overflow = self.surroundings.read(self._unscale(shown))
        self._checked[side] = _Checked(overflow, backwards)

    def _divide(self, side: EngineOptimizer) -> bool:
        """Divide an optimizer's gradients; whether any of this rank's is not finite."""
        if not side.gradients.are_deferred:
            return self.surroundings.read(self._unscale(side.gradients.tensors()))
        for unit in side.used_units:
            _require_range(unit.memory.master_dtype)
        return not side.gradients.divide(self._scale.value)

    @torch.no_grad()
    def _unscale(self, gradients: Sequence[Tensor]) -> Tensor:
        """Divide gradients in place; returns, as a tensor of one element, whether any of theirs is not finite."""
        inverse, alike = 1.0 / self._scale.value, defaultdict[tuple[torch.device, torch.dtype], list[Tensor]](list)
        for gradient in gradients:
            _require_range(gradient.dtype, gradient.layout)
            real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            alike[real.device, real.dtype].append(real)
        verdicts = []
        for (device, _), some in alike.items():
            found = torch.zeros(1, dtype=torch.float32, device=device)
            factor = self.surroundings.number(inverse, device)
            torch._amp_foreach_non_finite_check_and_unscale_(some, found, factor)
            verdicts.append(found)
        if not verdicts:
            return torch.zeros(1, dtype=torch.float32)
        return torch.stack([verdict.to(verdicts[0].device) for verdict in verdicts]).amax(0)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """``optimizer.step(*args, **kwargs)``, unless gradients have overflowed. For all ranks, together.

        Returns:
            What the optimizer's ``step`` returns; None if it was skipped.

        Raises:
            RuntimeError: If there is a closure, or the optimizer has stepped since the last ``update``.
            ValueError: As ``unscale_``.

        """
        side = _side(optimizer)
        inner = side.optimizer if isinstance(side, EngineOptimizer) else side
        if not self._enabled:
            return inner.step(*args, **kwargs)
        if args or kwargs.get("closure") is not None:
            raise RuntimeError(
                "Expected no closure: a step that calls it would see gradients that are scaled. Call the closure before"
                " scaler.step(optimizer)."
            )
        known = self._checked.get(side)
        if known is not None and known.stepped:
            raise RuntimeError("Expected scaler.update() between two steps of an optimizer, got none.")
        if known is None or known.counted:
            self.unscale_(optimizer)
        checked = self._checked[side]
        checked.stepped = True
        others = [other for other in self._checked.values() if self._common_verdict and not other.counted]
        if any(verdict.overflow for verdict in [checked, *others]):
            self.skipped_steps += 1
            if isinstance(side, EngineOptimizer):
                side.window.is_over = True
            return None
        return inner.step(**kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Have the scale follow its rule. Once an iteration, after the steps of all optimizers.

        Args:
            new_scale: Set the scale to this instead.

        Raises:
            RuntimeError: If no gradients were looked at since the last time, or the scale is at its minimum and the
                rule says to raise.
            ValueError: If ``new_scale`` is not positive and finite.

        """
        if not self._enabled:
            return
        if new_scale is None and not self._checked:
            raise RuntimeError("Expected scaler.step(optimizer) or unscale_(optimizer) before scaler.update().")
        if self._common_verdict and new_scale is None and not all(c.stepped for c in self._checked.values()):
            return  # see [Note: when a verdict ends]
        new = [checked for checked in self._checked.values() if not checked.counted]
        for side, checked in list(self._checked.items()):
            checked.counted = True
            if checked.stepped or checked.backwards is None:
                del self._checked[side]
                if isinstance(side, EngineOptimizer):
                    side.overflowed = False
        if new_scale is not None:
            self._scale.set(float(new_scale))
        elif new:
            self._scale.update(any(checked.overflow for checked in new))

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The state, which ``torch.amp.GradScaler`` can load as well; ``{}`` if not enabled."""
        return {**self._scale.state_dict(), "skipped_steps": self.skipped_steps} if self._enabled else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of a scaler of this class, of ``torch.amp.GradScaler`` or of a DeepSpeed optimizer.

        Factors and interval become those of the state, unless it followed another rule; a static scale stays.

        Raises:
            ValueError: If it is none of these.

        """
        if self._enabled:
            self._scale.load_state_dict(state_dict)
            self.skipped_steps = int(state_dict.get("skipped_steps", 0))


def _side(optimizer: Optimizer) -> EngineOptimizer | Optimizer:
    """The engine's side of an optimizer, or the optimizer itself if no engine has it."""
    return getattr(optimizer, "_engine_optimizer", optimizer)


def _require_range(dtype: torch.dtype, layout: torch.layout = torch.strided) -> None:
    if layout is not torch.strided or dtype is torch.float16:
        raise ValueError(
            f"Expected dense gradients of more range than float16 to unscale, got {dtype}, {layout}. Keep parameters in"
            " float32 and compute under torch.autocast."
        )
