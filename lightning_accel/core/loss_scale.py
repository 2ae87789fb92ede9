"""How a loss scale changes from step to step: rules as data, and the scale that follows one of them. No tensors.

All rules are one, with other numbers. Every step with finite gradients counts, from ``-warm_up`` on; when the count
reaches ``growth_interval`` the scale grows and the count is 0 again. An overflow uses up one of the ``hysteresis``
overflows that are forgiven, or lowers the scale, and the count starts anew at ``-warm_up``. torch's rule forgives none
and has no warm-up; DeepSpeed's looks at the distance from the last overflow, so that the step right after it (and the
first one of all) does not count.

Sources: ``torch.amp.GradScaler``; ``DynamicLossScaler`` in deepspeed/runtime/fp16/loss_scaler.py; Micikevicius et al.,
"Mixed Precision Training", 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

LARGEST = float.fromhex("0x1.fffffep+127")
"""Largest fp32 number: scales travel as fp32."""
SMALLEST = 2.0**-126
"""Smallest scale whose inverse is an fp32 number with all of its digits."""


@dataclass(frozen=True, kw_only=True)
class ScaleRule:
    """When and by how much a loss scale changes."""

    name: str
    """What the rule is called where one is chosen."""
    init_scale: float = 2.0**16
    """The first scale."""
    dynamic: bool = True
    """Whether the scale changes at all."""
    growth_factor: float = 2.0
    """What the scale is multiplied by when it grows."""
    backoff_factor: float = 0.5
    """What the scale is multiplied by after an overflow."""
    growth_interval: int = 2000
    """Steps with finite gradients, one after the other, until the scale grows. (DeepSpeed: ``loss_scale_window``.)"""
    warm_up: int = 0
    """How many steps with finite gradients do not count after an overflow, and at the start."""
    hysteresis: int = 1
    """The number of the overflow that lowers the scale. Those before it skip their step only."""
    consecutive_hysteresis: bool = False
    """Whether overflows must follow each other for that: any finite step forgives the earlier ones. Otherwise they are
    forgiven when the scale grows."""
    min_scale: float = SMALLEST
    """The scale gets no smaller."""
    raise_at_min_scale: bool = False
    """Whether an overflow that should lower the scale further is an error."""

    def __post_init__(self) -> None:
        for name in ("init_scale", "min_scale"):
            self._require(name, Real, lambda value: SMALLEST <= value <= LARGEST, "positive and a finite fp32 number")
        for name in ("growth_interval", "hysteresis"):
            self._require(name, int, lambda value: value >= 1, "at least 1")
        self._require("warm_up", int, lambda value: value >= 0, "at least 0")
        self._require("growth_factor", Real, lambda value: 1 < value < math.inf, "finite and greater than 1")
        self._require("backoff_factor", Real, lambda value: 0 < value < 1, "between 0 and 1")
        if self.min_scale > self.init_scale:
            raise ValueError(
                f"Expected min_scale to be at most init_scale, got {self.min_scale} and {self.init_scale}."
            )

    def _require(self, name: str, kind: type, fits: Callable[[Any], bool], what: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"Expected {name} to be {'a number' if kind is Real else 'an integer'}, got {value!r}.")
        if not fits(value):
            raise ValueError(f"Expected {name} to be {what}, got {value}.")


RULES: dict[str, ScaleRule] = {
    rule.name: rule
    for rule in (
        ScaleRule(name="torch"),
        ScaleRule(
            name="deepspeed", growth_interval=1000, warm_up=1, hysteresis=2, min_scale=1.0, raise_at_min_scale=True
        ),
        ScaleRule(name="static", dynamic=False),
    )
}
"""The rules with their authors' defaults, by name."""


def find_rule(name: str, **changes: Any) -> ScaleRule:
    """A rule with some of its numbers changed.

    Args:
        name: ``"torch"``, ``"deepspeed"`` or ``"static"``.
        changes: Fields of :class:`ScaleRule`. A static scale has ``init_scale`` only.

    Raises:
        ValueError: If there is no such rule, or a number is out of range or without effect.
        TypeError: If a field does not exist or a value is not a number.

    """
    if name not in RULES:
        raise ValueError(f"Expected rule to be one of {', '.join(RULES)}, got {name!r}.")
    base = RULES[name]
    known = [field.name for field in fields(base) if field.name not in ("name", "dynamic")]
    if unknown := [change for change in changes if change not in known]:
        raise TypeError(f"Expected settings out of {', '.join(known)}, got {', '.join(unknown)}.")
    if not base.dynamic and (idle := [change for change in changes if change != "init_scale"]):
        raise ValueError(f"Expected only init_scale for rule={name!r}, got {', '.join(idle)}. Leave them out.")
    return replace(base, **changes)


class LossScale:
    """A loss scale that follows a rule.

    Args:
        rule: The rule.

    """

    def __init__(self, rule: ScaleRule) -> None:
        self.rule = rule
        self.value = float(rule.init_scale)
        """The scale."""
        self._finite_steps = -rule.warm_up  # those that count towards growth
        self._forgiven = 0  # overflows that have not lowered the scale

    def update(self, overflow: bool) -> None:
        """Take note of one step.

        Args:
            overflow: Whether its gradients were not all finite.

        Raises:
            RuntimeError: If the scale would have to be smaller than the rule allows, and the rule says to raise.

        """
        rule = self.rule
        if not rule.dynamic:
            return
        if overflow:
            self._finite_steps = -rule.warm_up
            if self._forgiven < rule.hysteresis - 1:
                self._forgiven += 1
                return
            if self.value <= rule.min_scale and rule.raise_at_min_scale:
                raise RuntimeError(
                    f"Expected finite gradients at the smallest loss scale, {rule.min_scale}, got an overflow again."
                    " Look for NaN or Inf in data and losses, lower min_scale, or set raise_at_min_scale=False to go on"
                    " skipping steps."
                )
            self.value = max(self.value * rule.backoff_factor, rule.min_scale)
            return
        self._finite_steps += 1
        grows = self._finite_steps >= rule.growth_interval
        if grows:
            self._finite_steps = 0
            if self.value * rule.growth_factor <= LARGEST:
                self.value *= rule.growth_factor
        if grows or rule.consecutive_hysteresis:
            self._forgiven = 0

    def set(self, value: float) -> None:
        """Set the scale by hand.

        Raises:
            ValueError: If it is not positive and finite.

        """
        self.value = float(replace(self.rule, init_scale=value).init_scale)

    def state_dict(self) -> dict[str, Any]:
        """What ``torch.amp.GradScaler`` saves and can load, and what it does not know of."""
        rule = self.rule
        return {
            "scale": self.value,
            "growth_factor": rule.growth_factor,
            "backoff_factor": rule.backoff_factor,
            "growth_interval": rule.growth_interval,
            "_growth_tracker": max(self._finite_steps, 0),
            "rule": rule.name,
            "finite_steps": self._finite_steps,
            "forgiven": self._forgiven,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another scale was: one of these, of torch's or of DeepSpeed's.

        As with torch, factors and interval are those of the state, unless it followed another rule than this. A static
        scale stays what it is.

        Args:
            state: What ``state_dict`` of this class, of ``torch.amp.GradScaler`` or of a DeepSpeed optimizer returned.

        Raises:
            ValueError: If it is none of these.

        """
        if "cur_scale" in state or "loss_scaler" in state:
            state = _of_deepspeed(state)
        needed = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
        if missing := [name for name in needed if name not in state]:
            raise ValueError(
                f"Expected the state of a gradient scaler, got one without {', '.join(missing)} (it has"
                f" {', '.join(map(str, state)) or 'nothing'}). Was it saved with a precision that scales gradients?"
            )
        if not self.rule.dynamic:
            return
        rule = self.rule
        if state.get("rule", "torch") == rule.name:
            changed = {name: state[name] for name in ("growth_factor", "backoff_factor", "growth_interval")}
            rule = replace(rule, **changed)
        value = float(state["scale"])
        if not 0 < value < math.inf:
            raise ValueError(f"Expected the state of a gradient scaler with a positive and finite scale, got {value}.")
        self.rule = rule
        self.value = min(max(value, rule.min_scale), LARGEST)
        finite = int(state.get("finite_steps", state["_growth_tracker"]))
        self._finite_steps = max(min(finite, rule.growth_interval - 1), -rule.warm_up)
        self._forgiven = min(int(state.get("forgiven", 0)), rule.hysteresis - 1)


def _of_deepspeed(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a DeepSpeed optimizer's loss scaler, in the names of this module.

    Stages 1 to 3 save the scaler itself (``loss_scaler``), the others its numbers.
    """
    inner = state.get("loss_scaler", state)
    found: Mapping[str, Any] = inner if isinstance(inner, Mapping) else vars(inner)
    if "cur_scale" not in found:
        raise ValueError(f"Expected DeepSpeed's loss scaler to have 'cur_scale', got {', '.join(found) or 'nothing'}.")
    factor = float(found.get("scale_factor", RULES["deepspeed"].growth_factor))
    window = int(found.get("scale_window", RULES["deepspeed"].growth_interval))
    finite = int(found.get("cur_iter", 0)) - int(found.get("last_overflow_iter", -1)) - 2
    if finite > 0:
        finite %= window  # it grew every so many steps, and never counted from zero again
    return {
        "scale": found["cur_scale"],
        "growth_factor": factor,
        "backoff_factor": 1.0 / factor,
        "growth_interval": window,
        "_growth_tracker": max(finite, 0),
        "rule": "deepspeed",
        "finite_steps": finite,
        "forgiven": int(found.get("delayed_shift", 1)) - int(found.get("cur_hysteresis", 1)),
    }
