"""What a user may ask an ``Accelerator`` for by name, and what he may have meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins import Precision
from lightning.fabric.strategies import Strategy

from lightning_accel.plugins.accel_precision import PolicyPrecision
from lightning_accel.strategies.fabric import (
    AccelDDPStrategy,
    AccelFabricStrategy,
    AccelFSDPStrategy,
    AccelZeROStrategy,
)
from lightning_accel.variables import DEEPSPEED_CONFIG, STRATEGY

PRECISIONS = {"no": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed", "fp8": "fp8-mixed"}
"""Accelerate's names, and Lightning's."""

_ELSEWHERE = {
    "automatic_checkpoint_naming": "is not needed: save_state() without a folder names checkpoints under project_dir",
    "dataloader_config": "has its settings here: split_batches, even_batches, dispatch_batches, non_blocking",
    "deepspeed_plugin": "is deepspeed_config='ds.json' or a strategy here: 'zero1', 'zero2', 'zero3'",
    "deepspeed_plugins": "is deepspeed_config='ds.json' or a strategy here: 'zero1', 'zero2', 'zero3'",
    "device_placement": "is not offered: models and batches are moved to accelerator.device",
    "dynamo_backend": "is torch.compile(model) before prepare, or compile=... on the strategy",
    "dynamo_plugin": "is torch.compile(model) before prepare, or compile=... on the strategy",
    "fsdp_plugin": "is a strategy here: 'fsdp' or strategies.fabric.AccelFSDPStrategy(...)",
    "gradient_accumulation_plugin": "is gradient_accumulation_steps here; windows end with the loader",
    "kwargs_handlers": "is not needed: grad_scaler, timeout, process_group_backend and reduce_dtype (a comm_hook that"
    " compresses to fp16 or bf16) are the strategy's options",
    "megatron_lm_plugin": "is not offered: there is no tensor or pipeline parallelism",
    "parallelism_config": "is not offered: there is data parallelism only",
    "project_config": "has its settings here: project_dir, logging_dir, checkpoints_total_limit",
    "rng_types": "is not needed: shuffling has a seed that all ranks share, and save_state keeps every rank's numbers",
    "use_seedable_sampler": "is not needed: shuffling always has a seed that all ranks share",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """What a misspelt name may have meant, as the rest of a sentence; nothing if no name is like it."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def strategies() -> dict[str, Callable[[], AccelFabricStrategy]]:
    """The strategies by the names of their rows. Their checkpoints are directories, ``ddp``'s as well."""
    return {
        row: partial(kind, state_dict_type="sharded", **arguments)
        for kind in (AccelDDPStrategy, AccelZeROStrategy, AccelFSDPStrategy)
        for row, arguments in kind.registered().items()
    }


def choose_strategy(strategy: Any, deepspeed_config: Any, environment: Mapping[str, str]) -> AccelFabricStrategy:
    """The strategy that arguments ask for, or the environment where they say nothing.

    Args:
        strategy: As for ``find_strategy``; None if it was not given.
        deepspeed_config: A DeepSpeed file, or a dict of what would be in it; None if it was not given.
        environment: What `accel launch` was told.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a strategy and a file are asked for, or one of them is not accepted.
        TypeError: As ``find_strategy``.

    """
    told, row = environment.get(DEEPSPEED_CONFIG) or None, environment.get(STRATEGY) or None
    if deepspeed_config is None and told is not None:
        if isinstance(strategy, AccelZeROStrategy) and strategy.has_file:
            return strategy
        strategy = row if strategy is None else strategy
        if strategy is not None:
            raise ValueError(
                f"Expected a strategy or a DeepSpeed file, got {strategy!r} and, in {DEEPSPEED_CONFIG} as accel launch"
                f" --deepspeed_config sets it, {told}. Leave one of them out."
            )
        deepspeed_config = told
    elif deepspeed_config is not None and strategy is not None:
        raise ValueError(
            f"Expected strategy or deepspeed_config, which says it, got both: {strategy!r} and {deepspeed_config!r}."
            " Options beside those of the file are strategies.fabric.AccelZeROStrategy(config=..., ...)'s."
        )
    if deepspeed_config is not None:
        return AccelZeROStrategy(config=deepspeed_config, state_dict_type="sharded")
    return find_strategy(strategy if strategy is not None else row or "ddp")


def find_strategy(strategy: Any) -> AccelFabricStrategy:
    """The strategy that was asked for.

    Args:
        strategy: A row's name, with or without ``accel_`` before it, or a strategy of
            ``lightning_accel.strategies.fabric``.

    Raises:
        ValueError: If there is none of that name.
        TypeError: If it is something else.

    """
    if isinstance(strategy, AccelFabricStrategy):
        return strategy
    known = strategies()
    if isinstance(strategy, str):
        name = strategy.lower().removeprefix("accel_")
        if name in known:
            return known[name]()
        raise ValueError(f"Expected strategy to be one of {', '.join(known)}, got {strategy!r}.{nearest(name, known)}")
    hint = ""
    if isinstance(strategy, type):
        hint = " Make one of the class."
    elif isinstance(strategy, Strategy) or type(strategy).__module__.startswith(("lightning", "pytorch_lightning")):
        hint = " That one is for another loop."
    raise TypeError(
        f"Expected strategy to be one of {', '.join(known)} or a strategy of lightning_accel.strategies.fabric, such as"
        f" AccelFSDPStrategy(...), got {type(strategy).__name__}.{hint}"
    )


def precision_arguments(mixed_precision: Any) -> dict[str, Any]:
    """Fabric's arguments for a precision.

    Args:
        mixed_precision: ``"no"``, ``"fp16"``, ``"bf16"`` or ``"fp8"``, or a precision plugin such as
            ``AccelPrecision(...)``.

    Raises:
        ValueError: If there is none of that name.
        TypeError: If it is something else.

    """
    if isinstance(mixed_precision, (Precision, PolicyPrecision)):
        return {"plugins": [mixed_precision]}
    if isinstance(mixed_precision, torch.dtype) or not isinstance(mixed_precision, str):
        raise TypeError(
            f"Expected mixed_precision to be one of {', '.join(map(repr, PRECISIONS))} or a precision plugin such as"
            f" lightning_accel.AccelPrecision(...), got {mixed_precision!r}."
        )
    if mixed_precision.lower() not in PRECISIONS:
        near = nearest(mixed_precision.lower(), PRECISIONS)
        raise ValueError(
            f"Expected mixed_precision to be one of {', '.join(map(repr, PRECISIONS))}, got {mixed_precision!r}.{near}"
        )
    return {"precision": PRECISIONS[mixed_precision.lower()]}


def reject_unknown(constructor: Callable[..., Any], unknown: Mapping[str, Any]) -> None:
    """Raise if options were given that there are not.

    Raises:
        TypeError: Says for each what it may have meant, or where it is to be found.

    """
    if not unknown:
        return
    known = [
        name
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name != "self"
    ]
    said = [
        f"{name!r} {_ELSEWHERE[name]}." if name in _ELSEWHERE else f"{name!r} is unknown.{nearest(name, known)}"
        for name in unknown
    ]
    raise TypeError(f"Accelerator: {' '.join(said)} Options are {', '.join(known)}.")
