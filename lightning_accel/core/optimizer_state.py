"""Optimizer state by whole parameters, out of and into the segments of the ranks.

Every value of the state is one of two kinds: a tensor that belongs to elements (momentum; for optimizers that need
whole tensors, anything), which travels by itself, or a number or 0-dim tensor that is the same for all elements of a
parameter (step counts), which travels with the description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_accel.core.checkpoint.boxes import Box
from lightning_accel.core.checkpoint.shard import ranged
from lightning_accel.core.checkpoint.stored import fill_from
from lightning_accel.core.collectives import Collectives
from lightning_accel.core.full_state import put_together
from lightning_accel.core.layout import Layout, Piece
from lightning_accel.core.segment import Segment

if TYPE_CHECKING:
    from lightning_accel.core.collecting import Collecting
    from lightning_accel.core.optimizer import EngineOptimizer


_COUNTS = {"step", "eta", "mu", "mu_product"}
"""Values that torch's elementwise optimizers keep once for a parameter, as 0-dim tensors."""


@dataclass(frozen=True)
class _Entry:
    """What a rank has of the state of one segment."""

    unit: int
    pieces: list[Piece]
    whole: bool
    tensors: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """Where a part of a parameter's state is."""

    source: int
    """The rank that has it."""
    position: int
    """Of the entry, among the rank's."""
    entry: _Entry
    piece: Piece


def gather(optimizer: EngineOptimizer, later: Collecting | None = None) -> dict[nn.Parameter, dict[str, Any]] | None:
    """The state of whole parameters, on the CPU where it came from other ranks; one tensor at a time is sent.

    Args:
        optimizer: Whose state.
        later: If state rests sharded, tensors are put together when their values are asked for. All ranks of all copies
            call this together then.

    Returns:
        State by parameter, on every rank where optimizer state rests replicated; else on the first rank of each copy of
        the model state, None on others. All ranks of a copy must call this together in the latter case.

    """
    collectives = optimizer.engine.mesh.shard
    units = optimizer.units
    state = optimizer.optimizer.state
    mine = [segment for segment in optimizer.segments if segment.tensor in state]
    entries = [_describe(segment, units.index(segment.unit), state[segment.tensor]) for segment in mine]
    full: dict[nn.Parameter, dict[str, Any]] = {p: dict(values) for p, values in optimizer.waiting_state.items()}
    everyone = collectives.gather_objects(entries) if optimizer.sharded else [entries]
    keeps = collectives.rank == 0 or not optimizer.sharded
    if later is not None and optimizer.sharded:
        _add(full, optimizer, later, mine, everyone)
        return full if keeps and optimizer.engine.mesh.is_first_copy else None
    for source, theirs in enumerate(everyone):
        for position, entry in enumerate(theirs):
            unit = units[entry.unit]
            for key, (shape, dtype) in entry.tensors.items():
                value = None
                if not optimizer.sharded or source == collectives.rank:
                    value = state[mine[position].tensor][key]
                if optimizer.sharded:
                    value = _on_first(collectives, source, value, shape, dtype)
                if value is not None:
                    _assemble(full, unit, entry, key, value)
            if keeps:
                for piece in entry.pieces:
                    full.setdefault(unit.parameters[piece.slot], {}).update(
                        {key: copied(value) for key, value in entry.others.items()}
                    )
    return full if keeps else None


def _add(
    full: dict[nn.Parameter, dict[str, Any]],
    optimizer: EngineOptimizer,
    later: Collecting,
    mine: Sequence[Segment],
    everyone: Sequence[Sequence[_Entry]],
) -> None:
    """Have all tensors of the state put together later."""
    parts: dict[tuple[nn.Parameter, str], list[_Part]] = {}
    units = optimizer.units
    for source, theirs in enumerate(everyone):
        for position, entry in enumerate(theirs):
            for piece in entry.pieces:
                parameter = units[entry.unit].parameters[piece.slot]
                full.setdefault(parameter, {}).update({key: copied(value) for key, value in entry.others.items()})
                for key in entry.tensors:
                    parts.setdefault((parameter, key), []).append(_Part(source, position, entry, piece))
    for (parameter, key), pieces in parts.items():
        shape, dtype = pieces[0].entry.tensors[key]
        shape = shape if pieces[0].entry.whole else parameter.shape
        job = partial(_put_together, optimizer, mine, parameter, key, pieces)
        full[parameter][key] = later.add(job, shape, dtype)


def _put_together(
    optimizer: EngineOptimizer, mine: Sequence[Segment], parameter: nn.Parameter, key: str, parts: Sequence[_Part]
) -> Tensor | None:
    """One state value of a parameter, on rank 0."""
    mesh = optimizer.engine.mesh
    if not mesh.is_first_copy:
        return None
    whole: Tensor | None = None
    for part in parts:
        shape, dtype = part.entry.tensors[key]
        length = part.piece.stop - part.piece.start
        value = optimizer.optimizer.state[mine[part.position].tensor][key] if part.source == mesh.shard.rank else None
        if part.entry.whole:
            whole = _on_first(mesh.shard, part.source, value, shape, dtype)
            continue
        begin = part.piece.start - part.entry.pieces[0].start
        value = None if value is None else value[begin : begin + length]
        sent = _on_first(mesh.shard, part.source, value, torch.Size([length]), dtype)
        if sent is not None:
            if whole is None:
                whole = torch.empty_strided(parameter.shape, parameter.stride(), dtype=dtype)
            slot = optimizer.units[part.entry.unit].layout.slots[part.piece.slot]
            start = part.piece.start - slot.start
            whole.as_strided((slot.numel,), (1,))[start : start + length] = sent
    return whole


def _on_first(
    collectives: Collectives, source: int, value: Tensor | None, shape: torch.Size, dtype: torch.dtype
) -> Tensor | None:
    """A tensor of rank ``source``, on the CPU of the first rank; None on the others."""
    if source == 0:
        return None if value is None else value.cpu()
    numel = math.prod(shape)
    layout = Layout((), tuple(0 if rank <= source else numel for rank in range(collectives.ranks + 1)))
    part = torch.empty(0, dtype=dtype) if value is None else value.contiguous().view(-1)
    whole = put_together(part, layout, collectives)
    return None if whole is None else whole.view(shape)


def _describe(segment: Segment, unit: int, values: Mapping[str, Any]) -> _Entry:
    entry = _Entry(unit, segment.pieces, segment.whole)
    for key, value in values.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            segment.require_divisible(key, value)
            entry.tensors[key] = (value.shape, value.dtype)
        else:
            entry.others[key] = value.cpu() if isinstance(value, Tensor) else value
    return entry


def _assemble(full: dict[nn.Parameter, dict[str, Any]], unit: Any, entry: _Entry, key: str, value: Tensor) -> None:
    """Put a rank's part of one state value where it belongs in whole parameters."""
    for piece in entry.pieces:
        parameter = unit.parameters[piece.slot]
        values = full.setdefault(parameter, {})
        if entry.whole:
            values[key] = value
            continue
        slot = unit.layout.slots[piece.slot]
        if key not in values:
            values[key] = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=value.dtype, device=value.device
            )
        memory = values[key].as_strided((slot.numel,), (1,))
        begin = piece.start - entry.pieces[0].start
        memory[piece.start - slot.start : piece.stop - slot.start] = value[begin : begin + piece.stop - piece.start]


def scatter(
    optimizer: EngineOptimizer, state: Mapping[nn.Parameter, Mapping[str, Any]], segments: Sequence[Segment]
) -> list[Segment]:
    """Set the state of segments of this rank from that of whole parameters.

    Args:
        optimizer: Whose state is set.
        state: State by parameter; parameters that have none are left without.
        segments: Segments that have no state.

    Returns:
        The segments, cut where neighbours have different step counts or only one has state.

    """
    cut: list[Segment] = []
    for segment in segments:
        parameters = [segment.unit.parameters[piece.slot] for piece in segment.pieces]
        cut += segment.split([_signature(state.get(p), p) for p in parameters], {})
    for segment in cut:
        values = [state.get(segment.unit.parameters[piece.slot]) for piece in segment.pieces]
        if values[0]:
            optimizer.optimizer.state[segment.tensor] = {
                key: _cut(optimizer, segment, key, [v[key] for v in values if v is not None]) for key in values[0]
            }
            optimizer.keep_state([segment])
    return cut


def _signature(values: Mapping[str, Any] | None, parameter: nn.Parameter) -> tuple[Any, ...]:
    if not values:
        return ()
    return tuple(
        (key, repr(value.item() if isinstance(value, Tensor) else value) if _is_count(key, value, parameter) else "")
        for key, value in sorted(values.items())
    )


def _is_count(key: str, value: Any, parameter: nn.Parameter) -> bool:
    """Whether a value is one for the whole parameter. The shape tells, but for parameters that are scalars."""
    return not isinstance(value, Tensor) or (value.dim() == 0 and (parameter.dim() > 0 or key in _COUNTS))


def _cut(optimizer: EngineOptimizer, segment: Segment, key: str, values: list[Any]) -> Any:
    """One value of the state for a segment, from those of the parameters it covers."""
    first, target = values[0], segment.tensor
    if key == "step":
        return _step(optimizer, segment, first)
    if not isinstance(first, Tensor):
        return first
    dtype = first.dtype
    if first.is_floating_point() and target.is_floating_point():
        dtype = torch.float32 if _has_fp32_moments(optimizer) else target.dtype
    if segment.whole:
        whole = torch.empty(first.shape, dtype=dtype, device=target.device)
        fill_from(first, [(Box.whole(first.shape), whole)])
        return whole
    parameters = [segment.unit.parameters[piece.slot] for piece in segment.pieces]
    if _is_count(key, first, parameters[0]):
        return first.to(target.device).clone()
    cut = torch.empty(segment.stop - segment.start, dtype=dtype, device=target.device)
    for piece, value in zip(segment.pieces, values, strict=True):
        begin = piece.start - segment.unit.layout.slots[piece.slot].start
        part = cut[piece.start - segment.start : piece.stop - segment.start]
        fill_from(value, ranged(value.shape, segment.unit.memory.strides[piece.slot], begin, part))
    return cut


def _step(optimizer: EngineOptimizer, segment: Segment, value: Any) -> Any:
    """A step count as the optimizer keeps it: DeepSpeed's as an int, torch's as a tensor."""
    if optimizer.is_deepspeeds:
        return int(value)
    if not isinstance(value, Tensor):
        if not type(optimizer.optimizer).__module__.startswith("torch.optim."):
            return value
        value = torch.tensor(float(value), dtype=torch.float32)
    # As torch's own load_state_dict: on the device only if the implementation keeps it there.
    group = optimizer.optimizer.param_groups[segment.group]
    on_device = group.get("capturable") or group.get("fused")
    return value.to(dtype=torch.float32, device=segment.tensor.device).clone() if on_device else value.clone()


def _has_fp32_moments(optimizer: EngineOptimizer) -> bool:
    """Whether moments are fp32 whatever the parameters are: in bf16, a decay of 0.999 would be none."""
    return optimizer.is_deepspeeds and getattr(optimizer.optimizer, "fp32_optimizer_states", True)


def by_number(optimizer: EngineOptimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict in torch's format from one that calls parameters by their names.

    Raises:
        ValueError: If the groups hold other parameters than the optimizer's; all are listed by name.

    """
    saved = state_dict.get("param_groups", [])
    if not any(isinstance(name, str) for group in saved for name in group["params"]):
        return dict(state_dict)
    everything = dict(optimizer.engine.module.named_parameters(remove_duplicate=False))
    names = optimizer.engine.names
    current = [list(group["params"]) for group in optimizer.optimizer.param_groups]
    problems = []
    if len(saved) != len(current):
        problems.append(f"parameter groups: expected {len(current)}, got {len(saved)}")
    for index in range(max(len(saved), len(current))):
        now = [names[parameter] for parameter in current[index]] if index < len(current) else []
        then = [
            names.get(everything[name], name) if name in everything else name
            for name in (saved[index]["params"] if index < len(saved) else [])
        ]
        for what, listed in (("missing", set(now) - set(then)), ("unexpected", set(then) - set(now))):
            if listed:
                problems.append(f"parameter group {index}: {what}: {', '.join(sorted(listed))}")
    if problems:
        raise ValueError(
            f"Expected a state that fits this {type(optimizer.optimizer).__name__}, got one that does not:\n  "
            + "\n  ".join(problems)
            + "\nIt was made with another configure_optimizers, or with other parameters frozen."
        )
    number = {parameter: index for index, parameter in enumerate(p for group in current for p in group)}
    state = {
        number[everything[key]] if key in everything and isinstance(values, Mapping) else key: values
        for key, values in state_dict["state"].items()
    }
    groups = []
    for now_group, then_group in zip(current, saved, strict=True):
        groups.append({**then_group, "params": [number[parameter] for parameter in now_group]})
    return {**state_dict, "state": state, "param_groups": groups}


def require_fit(optimizer: EngineOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise unless a state dict fits the optimizer.

    Raises:
        ValueError: Lists all that is missing, unexpected or of the wrong shape.

    """
    names = optimizer.engine.names
    problems: list[str] = []
    for key in ("state", "param_groups"):
        if key not in state_dict:
            problems.append(f"missing: the entry {key!r}")
    saved = state_dict.get("param_groups", [])
    current = optimizer.optimizer.param_groups
    if not problems and len(saved) != len(current):
        problems.append(f"parameter groups: expected {len(current)}, got {len(saved)}")
    elif not problems:
        problems += [
            f"parameter group {index}: expected {len(now['params'])} parameters, got {len(then['params'])}"
            for index, (now, then) in enumerate(zip(current, saved, strict=True))
            if len(now["params"]) != len(then["params"])
        ]
    if not problems:
        parameters = list(optimizer.parameters())
        for index, values in state_dict["state"].items():
            if not isinstance(index, int):
                continue  # a value of the optimizer's own
            if index not in range(len(parameters)):
                problems.append(f"unexpected: state of parameter number {index}, of {len(parameters)}")
                continue
            parameter = parameters[index]
            problems += [
                f"{names[parameter]}: {key!r} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}"
                for key, value in values.items()
                if not optimizer.whole and isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape
            ]
    if problems:
        raise ValueError(
            f"Expected a state that fits this {type(optimizer.optimizer).__name__}, got one that does not:\n  "
            + "\n  ".join(problems)
        )


def copied(value: Any) -> Any:
    """A value of the state in memory of its own."""
    return value.clone() if isinstance(value, Tensor) else value
