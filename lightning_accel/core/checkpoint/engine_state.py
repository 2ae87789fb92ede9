"""What an engine has of a model's and its optimizers' state, by the names of parameters: out of it and into it.

Nothing is gathered: out come the parts that this rank updates, in go the parts that this rank keeps. So it does not
matter which row, how many ranks or which precision a checkpoint was saved with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.core.checkpoint.boxes import Box
from lightning_accel.core.checkpoint.recorder import Copies, recorded
from lightning_accel.core.checkpoint.shard import Shard, ranged
from lightning_accel.core.checkpoint.stored import StoredTensor, fill_from
from lightning_accel.core.placement import Rest
from lightning_accel.core.unanimous import unanimous

if TYPE_CHECKING:
    from lightning_accel.core.engine import Engine
    from lightning_accel.core.optimizer import EngineOptimizer
    from lightning_accel.core.unit import Unit


def model_shards(engine: Engine, module: nn.Module | None = None) -> dict[str, Any]:
    """A module's ``state_dict`` with this rank's parts in the places of parameters. All ranks take part.

    Args:
        engine: The engine that has the parameters.
        module: The module, or a part of it or one that holds it; the engine's by default.

    Returns:
        Parameters are ``Shard``, in the dtype that they came with; all else is what the module has on this rank.

    """
    shards = parameter_shards({unit: unit.memory.mine for unit in _settled(engine)})
    for parameter in engine.names:
        if parameter not in shards:  # it is in no unit
            shards[parameter] = Shard.whole(parameter, not parameter.requires_grad)
    state = (module or engine.module).state_dict(keep_vars=True)
    return {name: _detached(shards, value) for name, value in state.items()}


def _settled(engine: Engine) -> list[Unit]:
    engine.build()
    for unit in engine.units:
        unit.memory.before_update()  # if master values were changed to be kept
    return engine.units


def _detached(shards: Mapping[Any, Shard], value: Any) -> Any:
    if isinstance(value, nn.Parameter) and value in shards:
        return shards[value]
    return value.detach() if isinstance(value, Tensor) else value


def parameter_shards(flats: Mapping[Unit, Tensor]) -> dict[nn.Parameter, Shard]:
    """This rank's parts of what there is one value of for each of the parameters'.

    Args:
        flats: For each unit, 1-D, what this rank has of it.

    """
    found: dict[nn.Parameter, Shard] = {}
    for unit, flat in flats.items():
        start, stop = unit.part
        for position, (parameter, slot) in enumerate(zip(unit.parameters, unit.layout.slots, strict=True)):
            begin, end = max(slot.start, start), min(slot.stop, stop)
            frozen = not parameter.requires_grad
            shape = parameter.shape
            if not slot.numel:
                found[parameter] = Shard.whole(flat.new_empty(shape), frozen)
            elif begin < end:
                part, strides = flat[begin - start : end - start], unit.memory.strides[position]
                found[parameter] = Shard.of_range(shape, strides, begin - slot.start, part, frozen)
            else:
                found[parameter] = Shard(shape, flat.dtype, (), frozen)
    return found


# ---------------------------------------------------------------------- loading a model


def load_model(
    module: nn.Module, state: Mapping[str, Any], *, strict: bool = True, engine: Engine | None = None
) -> Any:
    """As ``module.load_state_dict``, reading this rank's parts only. All ranks take part if there is an engine.

    What a module's own ``load_state_dict`` and its hooks do with names and values is done; that values are copied into
    parameters and buffers happens afterwards, if nothing was raised.

    Args:
        module: The module, or a part of the engine's.
        state: Values by name; those of a checkpoint directory are read from it.
        strict: Raise if names are missing or unexpected.
        engine: The engine that has the module's parameters.

    Returns:
        What the module's ``load_state_dict`` returns: names that are missing and unexpected.

    Raises:
        RuntimeError: If names are missing or unexpected, or shapes differ: all are listed, and nothing was changed.
        ValueError: On all ranks, if any of them finds a file damaged. Some values may have been loaded then.

    """
    return prepare_model(module, state, strict=strict, engine=engine)()


def prepare_model(
    module: nn.Module, state: Mapping[str, Any], *, strict: bool = True, engine: Engine | None = None
) -> Callable[[], Any]:
    """The first half of ``load_model``, which changes nothing: it finds out whether the state fits.

    Args:
        module: As ``load_model``, likewise the others.
        state: Values by name.
        strict: Raise if names are missing or unexpected.
        engine: The engine that has the module's parameters.

    Returns:
        The second half, which loads the values and returns what ``load_model`` does.

    Raises:
        RuntimeError: If names are missing or unexpected, or shapes differ: all are listed.

    """
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    given = {
        # What is no parameter may be kept by whoever it belongs to.
        name: value.full() if isinstance(value, StoredTensor) and name not in parameters else value
        for name, value in state.items()
    }
    with recorded(module) as found:
        result = module.load_state_dict(given, strict=strict)

    def load() -> Any:
        with _changing(engine):
            if engine is None:
                _apply(found.copies, None)
            else:
                unanimous("loading a model", lambda: _apply(found.copies, engine), engine.collectives.gather_objects)
        for part, value in found.extra:
            part.set_extra_state(value)
        return result

    return load


@contextmanager
def _changing(engine: Engine | None) -> Iterator[None]:
    if engine is None:
        with torch.no_grad():
            yield
    else:
        with engine.changing():
            yield


def _apply(copies: Copies, engine: Engine | None) -> None:
    places = engine.places if engine is not None else {}
    last: dict[Tensor, Tensor] = {}
    for target, source in copies:
        if isinstance(source, StoredTensor) and last.get(target) is source:
            continue  # what is tied, under another of its names: it would be read again
        last[target] = source
        if isinstance(target, nn.Parameter) and target in places:
            unit, position = places[target]
            fill_part(unit, position, unit.memory.mine, source)
        else:
            fill_from(source, [(Box.whole(target.shape), target.detach())])


def fill_part(unit: Unit, position: int, flat: Tensor, source: Tensor) -> None:
    """Write this rank's piece of a whole tensor, which may be one of a checkpoint.

    Args:
        unit: The unit.
        position: Of the parameter in it.
        flat: 1-D: what this rank has of the unit.
        source: The whole tensor, of the parameter's shape.

    """
    slot = unit.layout.slots[position]
    start, stop = unit.part
    begin, end = max(slot.start, start), min(slot.stop, stop)
    if begin < end:
        part = flat[begin - start : end - start]
        fill_from(source, ranged(source.shape, unit.memory.strides[position], begin - slot.start, part))


# ----------------------------------------------------------------------------- optimizers


class _Scalar(NamedTuple):
    """A tensor without dimensions, as it is sent: to pickle one takes as long as to write some hundred kilobytes."""

    value: float | int | complex
    dtype: torch.dtype


def _light(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {
        key: _Scalar(value.item(), value.dtype) if isinstance(value, Tensor) and value.dim() == 0 else value
        for key, value in values.items()
    }


def _restored(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {
        key: torch.tensor(value.value, dtype=value.dtype) if isinstance(value, _Scalar) else value
        for key, value in values.items()
    }


def optimizer_shards(added: EngineOptimizer) -> dict[str, Any]:
    """The state of one optimizer by names of parameters. All ranks take part.

    Returns:
        ``"state"``: for each parameter that has any, its values by name; tensors are ``Shard``, numbers are on every
        rank. ``"param_groups"``: as torch's, with the names of parameters under ``"params"``.

    """
    if not added.is_released:
        added.refresh()
        added.engine.build()
    names = added.engine.names
    state: dict[str, dict[str, Any]] = {}
    numbers: dict[Any, Any] = {}

    def put(name: str, key: str, value: Any, shard: Callable[[Tensor], Shard]) -> None:
        if isinstance(value, Tensor) and value.dim() > 0:
            state.setdefault(name, {})[key] = shard(value)
        else:
            # Each parameter its own: whoever loads it counts in place.
            numbers.setdefault(name, {})[key] = value.to("cpu", copy=True) if isinstance(value, Tensor) else value

    for segment in added.segments:
        for key, value in added.optimizer.state.get(segment.tensor, {}).items():
            segment.require_divisible(key, value)
            for piece in segment.pieces:
                slot, parameter = segment.unit.layout.slots[piece.slot], segment.unit.parameters[piece.slot]
                strides = segment.unit.memory.strides[piece.slot]

                def cut(
                    value: Tensor,
                    segment: Any = segment,
                    piece: Any = piece,
                    slot: Any = slot,
                    parameter: nn.Parameter = parameter,
                    strides: tuple[int, ...] = strides,
                ) -> Shard:
                    if segment.whole:
                        return Shard.whole(value)
                    part = value[piece.start - segment.start : piece.stop - segment.start]
                    return Shard.of_range(parameter.shape, strides, piece.start - slot.start, part)

                put(names[parameter], key, value, cut)
    whole = dict(added.waiting_state)
    for owner, values in added.optimizer.state.items():
        if isinstance(owner, str):
            numbers[owner] = values  # some optimizers keep values of their own under names
        elif added.direct and isinstance(owner, nn.Parameter):
            whole[owner] = values
    for parameter, values in whole.items():
        for key, value in values.items():
            put(names[parameter], key, value, Shard.whole)
    if added.engine.row.optimizer_state is Rest.SHARDED:
        for theirs in added.gather({owner: _light(values) for owner, values in numbers.items()}):
            for owner, values in theirs.items():
                if owner not in numbers:
                    numbers[owner] = _restored(values)
    known = set(names.values())
    for owner, values in numbers.items():
        if owner in known:
            state.setdefault(owner, {}).update(values)
        else:
            state[owner] = values
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in added.optimizer.param_groups]
    return {"state": state, "param_groups": groups}
