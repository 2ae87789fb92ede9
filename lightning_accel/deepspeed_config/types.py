"""DeepSpeed's optimizers and schedules: their parameters, and what each is here.

DeepSpeed looks optimizers up in any case, schedules exactly; here both are found in any case. Optimizers that it does
not have it takes from torch.optim, by exact name, and so does this.
"""

from __future__ import annotations

from lightning_accel.deepspeed_config.keys import Key, Kind
from lightning_accel.deepspeed_config.values import (
    ANY_NUMBER,
    BETAS,
    FLAG,
    Check,
    number,
    numbers,
    one_of,
    only,
    whole,
)


def _is(name: str, check: Check, default: object = None) -> dict[str, Key]:
    return {name: Key(Kind.HONOURED, f"{name} of the optimizer", check, default)}


def _idle(why: str, *names: str) -> dict[str, Key]:
    return {name: Key(Kind.NO_CONSEQUENCE, why) for name in names}


_LR = _is("lr", number(), 1e-3)
_DECAY = _is("weight_decay", number(), 0.0)
_BETAS = _is("betas", BETAS, (0.9, 0.999))
_EPS = _is("eps", number(), 1e-8)
_CORRECTED = _is("bias_correction", only(True, "moments are always corrected for their bias"), True)
_AMSGRAD = _is("amsgrad", only(False, "DeepSpeed's own refuses it, too"), False)
_STATE = _idle("state is of the master values' dtype", "fp32_optimizer_states")
_GRADS = _idle("gradients rest in flat buffers", "set_grad_none")

_ADAM = {
    **_LR,
    **_BETAS,
    **_EPS,
    **_DECAY,
    **_CORRECTED,
    **_is("amsgrad", FLAG, False),
    **_is("torch_adam", FLAG, False),
    **_is("adam_w_mode", FLAG, True),
    **_GRADS,
    **_idle("the engine chooses what the step runs on", "foreach", "fused"),
    **_STATE,
}

OPTIMIZERS: dict[str, dict[str, Key]] = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "lamb": {
        **_LR,
        **_BETAS,
        **_EPS,
        **_DECAY,
        **_is("bias_correction", FLAG, True),
        **_is("eps_inside_sqrt", FLAG, False),
        **_is("max_grad_norm", only(0, "say gradient_clipping"), 0.0),
        **_is("max_coeff", number(above=True), 10.0),
        **_is("min_coeff", number(), 0.01),
        **_AMSGRAD,
    },
    "lion": {**_LR, **_BETAS, **_DECAY, **_GRADS, **_STATE},
    "adagrad": {
        **_is("lr", number(), 1e-2),
        **_is("lr_decay", number(), 0.0),
        **_DECAY,
        **_is("initial_accumulator_value", number(), 0.0),
        **_is("eps", number(), 1e-10),
        **_is("amsgrad", only(False, "Adagrad has none"), False),
        **_STATE,
    },
    "sgd": {
        **_LR,
        **_is("momentum", number(), 0.0),
        **_is("dampening", ANY_NUMBER, 0.0),
        **_DECAY,
        **_is("nesterov", FLAG, False),
        **_is("maximize", FLAG, False),
        **_idle("the engine chooses what the step runs on", "foreach", "fused"),
    },
    "muon": {
        **_is("lr", number()),
        **_is("muon_lr", number()),
        **_is("adam_lr", number()),
        **_is("momentum", number(0.0, 1.0), 0.95),
        **_is("betas", BETAS, (0.9, 0.95)),
        **_is("eps", number(), 1e-10),
        **_is("weight_decay", number(), 0.0),
        **_is("adam_w_mode", FLAG, True),
        **_is("per_head_muon", only(False, "matrices are orthogonalised whole"), False),
        **_idle("torch iterates in its own way to the same matrix", "ns_method"),
        **_idle("both are torch's Adam", "torch_adam"),
    },
}
"""By DeepSpeed's name in small letters: the parameters of each."""
for _parameters in OPTIMIZERS.values():
    _parameters.setdefault("max_grad_norm", Key(Kind.REMOVED, "say gradient_clipping"))

NOT_OFFERED = dict.fromkeys(
    ("muadam", "muadamw", "musgd"), "it is of the package mup; return it from configure_optimizers"
) | dict.fromkeys(
    ("onebitadam", "onebitlamb", "zerooneadam"),
    "1-bit optimizers were removed from DeepSpeed; gradient_compression=PowerSGD(...) sends less",
)
"""Optimizers that DeepSpeed has or had and this has not, and why."""


def _of(name: str, check: Check, default: object = None) -> dict[str, Key]:
    return {name: Key(Kind.HONOURED, f"{name} of the schedule", check, default)}


_LAST = _of("last_batch_iteration", whole(-1), -1)
_WARM = {
    **_of("warmup_num_steps", whole(1), 1000),
    **_of("warmup_type", one_of("log", "linear"), "log"),
    **_LAST,
}
_WARM_LR = {**_of("warmup_min_lr", numbers(number()), 0.0), **_of("warmup_max_lr", numbers(number()), 1e-3)}
_TOTAL = _of("total_num_steps", whole(1))

SCHEDULES: dict[str, dict[str, Key]] = {
    "LRRangeTest": {
        **_of("lr_range_test_min_lr", numbers(number()), 1e-3),
        **_of("lr_range_test_step_size", whole(1), 2000),
        **_of("lr_range_test_step_rate", number(), 1.0),
        **_of("lr_range_test_staircase", FLAG, False),
        **_LAST,
    },
    "OneCycle": {
        **_of("cycle_min_lr", number()),
        **_of("cycle_max_lr", number()),
        **_of("decay_lr_rate", number(), 0.0),
        **_of("cycle_first_step_size", whole(1), 2000),
        **_of("cycle_second_step_size", whole(1)),
        **_of("cycle_first_stair_count", whole(0), 0),
        **_of("cycle_second_stair_count", whole(0)),
        **_of("decay_step_size", whole(0), 0),
        **_of("cycle_momentum", FLAG, True),
        **_of("cycle_min_mom", number(), 0.8),
        **_of("cycle_max_mom", number(), 0.9),
        **_of("decay_mom_rate", number(), 0.0),
        **_LAST,
    },
    "WarmupLR": {**_WARM_LR, **_WARM},
    "WarmupDecayLR": {**_TOTAL, **_WARM_LR, **_WARM},
    "WarmupCosineLR": {
        **_TOTAL,
        **_of("warmup_min_ratio", number(0.0, 1.0), 0.0),
        **_of("cos_min_ratio", number(0.0, 1.0), 1e-4),
        **_WARM,
    },
}
"""By DeepSpeed's name: the parameters of each."""

REQUIRED = {
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
    "WarmupDecayLR": ("total_num_steps",),
    "WarmupCosineLR": ("total_num_steps",),
}
"""Parameters without defaults."""


def find_schedule(name: str) -> str | None:
    """A schedule's name as DeepSpeed writes it."""
    return next((known for known in SCHEDULES if known.lower() == name.lower()), None)
