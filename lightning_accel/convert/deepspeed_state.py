"""The fp32 values and the optimizer's state of each parameter in a DeepSpeed checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.convert.deepspeed_files import DeepSpeedFiles
from lightning_accel.convert.deepspeed_layout import Places, cut_by_group, cut_by_parameter, given_order
from lightning_accel.convert.joined import join

State = dict[str, dict[str, Tensor]]
"""By parameter, by key: ``fp32``, ``exp_avg``, ``exp_avg_sq``, ``step``, …"""


def zero_state(files: DeepSpeedFiles, left_out: list[str]) -> State:
    """Of stages 1 to 3.

    Args:
        files: The checkpoint.
        left_out: Gets what is not in the result, and why.

    Raises:
        ValueError: If the files do not fit each other.

    """
    ranks = [state["optimizer_state_dict"] for state in files.optimizers]
    if len(ranks) != files.ranks:
        raise ValueError(
            f"Expected {files.folder} to have *_optim_states.pt files of {files.ranks} ranks, as they say, got"
            f" {len(ranks)}."
        )
    inner = [rank["optimizer_state_dict" if files.is_stage_3 else "base_optimizer_state"] for rank in ranks]
    found: State = {}
    for group, shapes in enumerate(files.model["param_shapes"]):
        flat = [
            rank["fp32_flat_groups" if files.is_stage_3 else "single_partition_of_fp32_groups"][group] for rank in ranks
        ]
        lengths = [part.numel() for part in flat]
        if files.is_stage_3:
            places = cut_by_parameter(shapes, lengths)
        else:
            paddings = ranks[0].get("param_alignment_paddings")
            places = cut_by_group(shapes, lengths, [0] * len(shapes) if paddings is None else paddings[group])
        states = [state["state"].get(group, {}) for state in inner]  # nothing before the first step
        keys = [key for key in states[0] if all(key in state for state in states)]
        for name, shape in shapes.items():
            found[name] = {"fp32": _joined(name, flat, places, shape)}
            for key in keys:
                entries = [state[key] for state in states]
                if (scalar := own_scalar(entries[0])) is not None:
                    found[name][key] = scalar
                elif all(
                    isinstance(entry, Tensor) and entry.numel() >= n for entry, n in zip(entries, lengths, strict=True)
                ):
                    found[name][key] = _joined(name, entries, places, shape)
                elif (message := f"{key} of the optimizer: it is not of the parameters' size") not in left_out:
                    left_out.append(message)
    return found


def _joined(name: str, flat: Sequence[Tensor], places: Places, shape: Sequence[int]) -> Tensor:
    parts = [flat[rank].view(-1)[start : start + length] for rank, start, length in places[name]]
    return join(name, parts or [flat[0].view(-1)[:0]], shape)


def universal_state(files: DeepSpeedFiles) -> State:
    """Of a universal checkpoint.

    Raises:
        ValueError: If a file is missing, or has another shape than the model says.

    """
    flat = files.shared.get("optimizer_state_dict", {}).get("state", {})  # of stage 3: of rank 0
    found: State = {}
    for group, shapes in enumerate(files.model["param_shapes"]):
        for name, shape in shapes.items():
            where = f"{files.folder}/zero/{name}"
            if "fp32" not in files.universal.get(name, {}):
                raise ValueError(f"Expected {where} to have a file fp32.pt; it has none.")
            entries = {
                key: entry["param"] if isinstance(entry, Mapping) else entry
                for key, entry in files.universal[name].items()
            }
            if len(entries) > 1:
                entries.setdefault("step", flat.get(group, {}).get("step"))
            found[name] = {}
            for key, values in entries.items():
                if (scalar := own_scalar(values)) is not None:
                    found[name][key] = scalar
                elif isinstance(values, Tensor):
                    if values.numel() != math.prod(shape):
                        raise ValueError(
                            f"Expected {where}/{key}.pt to be of shape {tuple(shape)}, got {tuple(values.shape)}."
                        )
                    found[name][key] = values.view(tuple(shape))
    return found


def own_scalar(value: Any) -> Tensor | None:
    """A number as torch's optimizers keep it: a tensor of each parameter's own, as they change it in place."""
    if isinstance(value, Tensor) and not value.dim():
        return value.clone()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(float(value))
    return None


def optimizer_state(files: DeepSpeedFiles, state: State) -> dict[str, Any]:
    """The optimizer's state as torch's optimizers save it, but by parameter name.

    Args:
        files: The checkpoint.
        state: What ``zero_state`` or ``universal_state`` has returned.

    """
    groups, entries = [], {}
    for group, names in zip(_param_groups(files), _group_names(files), strict=True):
        step = group.get("step")  # here DeepSpeed's fused Adam counts
        settings = {key: value for key, value in group.items() if key not in ("params", "step")}
        groups.append({**settings, "params": names})
        for name in names:
            own = {key: value for key, value in state[name].items() if key != "fp32"}
            if own and "step" not in own and (scalar := own_scalar(step)) is not None:
                own["step"] = scalar
            if own:
                entries[name] = own
    return {"state": entries, "param_groups": groups}


def _param_groups(files: DeepSpeedFiles) -> list[dict[str, Any]]:
    """Learning rates and all that."""
    if files.universal:
        return list(files.shared["param_groups"])
    inner = files.shared.get("optimizer_state_dict", files.shared.get("base_optimizer_state"))
    return list(inner["param_groups"])  # type: ignore[index]


def _group_names(files: DeepSpeedFiles) -> list[list[str]]:
    """The parameters of each group, in the order in which the optimizer was given them."""
    names = [list(shapes) for shapes in files.model["param_shapes"]]
    counts = [len(group["params"]) for group in _param_groups(files)]
    if sum(counts) == len(names):  # stage 3 cuts large groups into several flat tensors, one after the other
        starts = [sum(counts[:index]) for index in range(len(counts))]
        names = [sum(names[start : start + count], []) for start, count in zip(starts, counts, strict=True)]
    config = files.model.get("ds_config")
    zero = config.get("zero_optimization", {}) if isinstance(config, Mapping) else {}
    if files.is_stage_3 or not zero.get("round_robin_gradients"):
        return names
    return [given_order(group, files.ranks) for group in names]
