"""Reads DeepSpeed's checkpoints, of ZeRO stages 1 to 3 and universal ones, without DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_accel.convert.contents import Contents, is_optimizer, lightning_version
from lightning_accel.convert.deepspeed_files import DeepSpeedFiles, read_deepspeed
from lightning_accel.convert.deepspeed_layout import parts_of
from lightning_accel.convert.deepspeed_state import State, optimizer_state, universal_state, zero_state
from lightning_accel.convert.joined import join

OWN_KEYS = frozenset(
    {
        "buffer_names",
        "checkpoint_parallel_dimensions",
        "csr_tensor_module_names",
        "data_sampler",
        "dp_world_size",
        "ds_config",
        "ds_version",
        "frozen_param_fragments",
        "frozen_param_shapes",
        "global_samples",
        "global_steps",
        "lr_scheduler",
        "module",
        "mp_world_size",
        "optimizer",
        "param_shapes",
        "random_ltd",
        "shared_params",
        "skipped_steps",
        "sparse_tensor_module_names",
        "universal_checkpoint_info",
    }
)
"""What a DeepSpeed engine saves. All else its user has added: Lightning's strategy its whole dictionary."""

_OLD_PREFIX = "_forward_module."
"""Before the names of all parameters in checkpoints of Lightning before 2.1."""


def open_deepspeed(folder: Path, *, weights_only: bool = True) -> Contents:
    """Open a DeepSpeed checkpoint.

    Args:
        folder: What ``find_deepspeed`` has returned.
        weights_only: Refuse everything but tensors, numbers, strings, their collections and DeepSpeed's records.

    Returns:
        Parameters are the optimizer's fp32 values; what it does not train has the values that the module has.

    Raises:
        ValueError: If files are missing or damaged, do not fit each other, or hold what is refused.

    """
    try:
        return _opened(read_deepspeed(folder, weights_only=weights_only))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"Expected {folder} to hold what DeepSpeed writes, but something in it is missing or of another kind:"
            f" {error!r}."
        ) from error


def _opened(files: DeepSpeedFiles) -> Contents:
    left_out: list[str] = []
    state: State = {}
    optimizers: list[dict[str, Any]] = []
    if files.universal:
        state = universal_state(files)
    elif files.optimizers:
        state = zero_state(files, left_out)
    else:
        optimizers = _undivided_optimizer(files, left_out)
    if state:
        optimizers = [optimizer_state(files, state)]
    if files.shared.get("dynamic_loss_scale"):
        left_out.append("the loss scale: its state is of DeepSpeed's own kind")
    given = {key: value for key, value in files.model.items() if key not in OWN_KEYS}
    nest: dict[str, Any] = {
        "epoch": 0,
        "global_step": int(files.model.get("global_steps") or 0),
        "pytorch-lightning_version": lightning_version(),
        "lr_schedulers": _schedulers(files, left_out),
        **given,
        "state_dict": _model(files, state),
        "optimizer_states": optimizers,
    }
    _drop_old_prefix(nest)
    writer = f"DeepSpeed {files.model.get('ds_version', 'of an unknown version')}"
    if "pytorch-lightning_version" in given:
        writer += f" through Lightning {given['pytorch-lightning_version']}"
    return Contents(nest, writer, int(files.model.get("dp_world_size") or files.ranks), left_out)


def _undivided_optimizer(files: DeepSpeedFiles, left_out: list[str]) -> list[dict[str, Any]]:
    """Of stage 0, whose model file holds it all."""
    if files.model.get("param_shapes") is not None:
        raise ValueError(
            f"Expected {files.folder} to have a file *_optim_states.pt of each rank, with the fp32 values of the"
            " parameters; it has none."
        )
    optimizer = files.model.get("optimizer")
    if is_optimizer(optimizer):
        return [dict(optimizer)]  # type: ignore[arg-type]
    if optimizer is not None:
        left_out.append(
            "the optimizer with its fp32 parameters: without ZeRO, DeepSpeed keeps them in a way of its own"
        )
    return []


def _model(files: DeepSpeedFiles, state: State) -> dict[str, Tensor]:
    """All parameters and buffers, in the module's order. What is tied is one object."""
    tied: Mapping[str, str] = files.model.get("shared_params") or {}
    frozen: Mapping[str, Sequence[int]] = files.model.get("frozen_param_shapes") or {}
    found: dict[str, Tensor] = {}
    for name, values in files.model["module"].items():
        if name in state:
            found[name] = state[name]["fp32"]
        elif tied.get(name) in found:
            found[name] = found[tied[name]]
        elif files.is_stage_3 and name in frozen:
            parts = parts_of(math.prod(frozen[name]), len(files.models))
            fragments = [model["frozen_param_fragments"][name].view(-1) for model in files.models]
            trimmed = [fragment[:part] for fragment, part in zip(fragments, parts, strict=True)]
            found[name] = join(name, trimmed, frozen[name])
        else:
            found[name] = values
    return found


def _schedulers(files: DeepSpeedFiles, left_out: list[str]) -> list[Any]:
    state = files.model.get("lr_scheduler")
    if isinstance(state, Mapping) and "last_epoch" in state:  # one of torch's
        return [dict(state)]
    if state is not None:
        left_out.append("the LR scheduler: its state is of DeepSpeed's own kind")
    return []


def _drop_old_prefix(nest: dict[str, Any]) -> None:
    model = nest["state_dict"]
    if not all(name.startswith(_OLD_PREFIX) for name in model):
        return
    nest["state_dict"] = {name.removeprefix(_OLD_PREFIX): values for name, values in model.items()}
    for optimizer in nest["optimizer_states"]:
        optimizer["state"] = {str(name).removeprefix(_OLD_PREFIX): entry for name, entry in optimizer["state"].items()}
        for group in optimizer["param_groups"]:
            group["params"] = [str(name).removeprefix(_OLD_PREFIX) for name in group["params"]]
