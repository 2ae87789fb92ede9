"""A running average of the parameters, kept in parts as the optimizer's state is.

For each unit one flat tensor, of the size of what this rank updates::

    parameters  |======= part 0 =======|======= part 1 =======|    a unit's buffer, which may have no memory just now
    average     |======= rank 0 =======|======= rank 1 =======|    each rank its part; all of it where optimizer state
                                                                   rests replicated

An update reads this rank's part of the parameters (``unit.memory.mine``) and writes this rank's part of the average:
nothing is sent, and nothing is gathered. The model can be given the averaged values in place, by ``swap``; the other
ranks get them as they do after an optimizer step.

[Note: what is averaged]
Units with anything to train have an average. Parameters that are frozen have none, because their value is the average,
until a state is loaded in which the two differ (they were trained before). Buffers are on all ranks, and so are their
averages. When units are laid out anew, averages of those that were taken apart are gathered and cut again, and what was
thawed begins with the value it had while it was frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_accel.core.checkpoint import Shard
from lightning_accel.core.checkpoint.engine_state import fill_part, parameter_shards
from lightning_accel.core.collectives import nbytes
from lightning_accel.core.engine import Engine
from lightning_accel.core.full_state import whole_values
from lightning_accel.core.placement import Rest
from lightning_accel.core.unit import Unit

AverageFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From average, current value and number of values averaged so far to the new average."""
MultiAverageFunction: TypeAlias = Callable[["list[Tensor]", "list[Tensor]", Tensor], None]
"""The same for lists of tensors of one dtype and device; changes the averages in place."""


class Average:
    """The average of an engine's parameters over many steps. All ranks make it together.

    Args:
        engine: Whose parameters are averaged. The average starts out as their values.
        avg_fn: Gives the new average of a tensor, as for ``torch.optim.swa_utils.AveragedModel``. It is called with 1-D
            tensors that hold parts of parameters, so it must treat each element alone. Default: the mean of all values
            that were averaged.
        multi_avg_fn: The same for lists of tensors, in place. Only one of the two may be given.
        buffers: ``"average"`` the buffers as well (booleans have the value of the last update); ``"copy"`` those of the
            last update; ``"leave"`` the model's buffers alone.
        device: Where the average is kept. Default: with the parameters.

    Raises:
        ValueError: If both functions are given.
        RuntimeError: If the engine is closed.

    Example::

        average = Average(engine, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
        for batch in batches:
            ...
            optimizer.step()
            average.update()
        average.transfer()

    """

    def __init__(
        self,
        engine: Engine,
        *,
        avg_fn: AverageFunction | None = None,
        multi_avg_fn: MultiAverageFunction | None = None,
        buffers: Literal["average", "copy", "leave"] = "average",
        device: torch.device | str | int | None = None,
    ) -> None:
        if avg_fn is not None and multi_avg_fn is not None:
            raise ValueError("Expected one of avg_fn and multi_avg_fn, got both. Leave one of them out.")
        self.count = 0
        """Number of values that were averaged."""
        self.is_swapped = False
        """Whether the model has the averaged values and the average the model's."""
        self._engine = engine
        self._avg_fn = avg_fn
        self._multi_avg_fn = multi_avg_fn
        self._buffers = buffers
        self._device = None if device is None else torch.device(device)
        self._flats: dict[Unit, Tensor] = {}
        self._frozen: dict[nn.Parameter, Tensor] = {}  # of parameters in no unit, if need be
        self._require_open()
        engine.build()
        self._lay_out()
        self._buffer_averages = {name: self._copied(buffer) for name, buffer in self._current_buffers()}
        engine.watch(self._lay_out)

    @property
    def nbytes(self) -> int:
        """Bytes of the average on this rank."""
        return sum(map(nbytes, [*self._flats.values(), *self._frozen.values(), *self._buffer_averages.values()]))

    # ------------------------------------------------------------------ layout

    def _require_open(self) -> None:
        if self._engine.is_closed:
            raise RuntimeError("Expected the average of an open engine, got that of one that was closed.")

    @property
    def _is_sharded(self) -> bool:
        return self._engine.row.optimizer_state is Rest.SHARDED

    def _copied(self, value: Tensor) -> Tensor:
        return value.detach().to(self._device or value.device, copy=True)

    def _current_buffers(self) -> Iterator[tuple[str, Tensor]]:
        return iter(()) if self._buffers == "leave" else self._engine.module.named_buffers()

    @torch.no_grad()
    def _lay_out(self) -> None:
        """Follow the engine's units. All ranks take part. See [Note: what is averaged]."""
        units = self._engine.units
        homeless: dict[nn.Parameter, Tensor] = {}
        for unit in [unit for unit in self._flats if unit not in units]:
            whole = self._whole(unit, self._flats.pop(unit))
            for position, parameter in enumerate(unit.parameters):
                homeless[parameter] = unit.memory.view(whole, position)
        for unit in units:
            for parameter in unit.parameters:
                if parameter in self._frozen:
                    homeless[parameter] = self._frozen.pop(parameter)
            known = [position for position, parameter in enumerate(unit.parameters) if parameter in homeless]
            if unit not in self._flats and (known or any(p.requires_grad for p in unit.parameters)):
                self._flats[unit] = self._copied(unit.memory.mine)
            for position in known:
                fill_part(unit, position, self._flats[unit], homeless.pop(unit.parameters[position]))
        self._frozen.update({parameter: self._copied(value) for parameter, value in homeless.items()})

    def _whole(self, unit: Unit, flat: Tensor) -> Tensor:
        """The average of a whole unit. All ranks take part where it is in parts."""
        if not self._is_sharded:
            return flat
        ranks = self._engine.mesh.shard  # each copy of the state has all of it
        whole = torch.empty(unit.layout.total, dtype=flat.dtype, device=ranks.device)
        whole[slice(*unit.part)] = flat.to(whole.device)
        ranks.all_gather(whole, unit.layout).wait()
        return whole

    def _parameter_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Averages of parameters on this rank and, for each, the current values."""
        pairs = [(flat, unit.memory.mine) for unit, flat in self._flats.items()]
        return pairs + [(average, parameter.detach()) for parameter, average in self._frozen.items()]

    def _buffer_pairs(self) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for name, buffer in self._current_buffers():
            average = self._buffer_averages.get(name)
            if average is None or average.shape != buffer.shape:
                before = "none" if average is None else f"one of shape {tuple(average.shape)}"
                raise RuntimeError(
                    f"Expected the model to keep its buffers, but {name!r} has shape {tuple(buffer.shape)}, and"
                    f" there was {before} when averaging began. Register buffers in the model's constructor."
                )
            pairs.append((average, buffer.detach()))
        return pairs

    # ------------------------------------------------------------------ update

    @torch.no_grad()
    def update(self) -> None:
        """Take the current values into the average; the first ones become the average. Sends nothing.

        Raises:
            RuntimeError: If the model has the averaged values, the engine is closed, or a buffer was added or has
                another shape than before.

        """
        self._require_open()
        if self.is_swapped:
            raise RuntimeError("Expected the model to have its own values, but it has the averaged ones. Call swap().")
        pairs, buffers = self._parameter_pairs(), self._buffer_pairs()
        if self._buffers == "average":
            pairs += buffers
        else:
            for average, current in buffers:
                average.copy_(current)
        if self.count == 0:
            for average, current in pairs:
                average.copy_(current)
        else:
            self._advance(pairs)
        self.count += 1

    def _advance(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for average, current in pairs:
            if average.numel():
                kinds.setdefault((average.device, average.dtype), []).append((average, current))
        for (device, dtype), members in kinds.items():
            averages = [average for average, _ in members]
            currents = [current.to(device) for _, current in members]
            count = torch.full((), self.count, device=device)  # filled there: to copy it would wait for the device
            if dtype is torch.bool:  # cannot be subtracted
                for average, current in zip(averages, currents, strict=True):
                    average.copy_(current)
            elif self._multi_avg_fn is not None:
                self._multi_avg_fn(averages, currents, count)
            elif self._avg_fn is not None:
                for average, current in zip(averages, currents, strict=True):
                    average.copy_(self._avg_fn(average, current, count))
            elif dtype.is_floating_point or dtype.is_complex:
                torch._foreach_lerp_(averages, currents, 1 / (self.count + 1))
            else:
                for average, current in zip(averages, currents, strict=True):
                    average.copy_(average + (current - average) / (self.count + 1))

    # -------------------------------------------------------- into the model

    def swap(self) -> None:
        """Exchange the average and the model's current values. All ranks take part.

        Raises:
            RuntimeError: If this is within backward, or the engine is closed.

        """
        self._require_open()
        with self._engine.changing():
            # A buffer that is written to is sent to all ranks after the next backward: most never change.
            buffers = [(a, b) for a, b in self._buffer_pairs() if not torch.equal(a.to(b.device), b)]
            for average, current in [*self._parameter_pairs(), *buffers]:
                kept = average.clone()
                average.copy_(current)
                current.copy_(kept)
        self.is_swapped = not self.is_swapped

    def transfer(self) -> None:
        """Give the model the averaged values. The average keeps them, too. All ranks take part.

        Raises:
            RuntimeError: If this is within backward, or the engine is closed.

        """
        self._require_open()
        if self.is_swapped:
            self.swap()
        with self._engine.changing():
            for average, current in [*self._parameter_pairs(), *self._buffer_pairs()]:
                current.copy_(average)

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """The averages of whole parameters and of buffers, by all of their names in the module; one at a time.

        Parameters without an average of their own are left out: their value is the average.

        Returns:
            On the CPU of rank 0, and ``{}`` on the others, where optimizer state rests sharded; all ranks must call
            this together. Elsewhere on every rank, without a copy.

        Raises:
            RuntimeError: If the engine is closed.

        """
        self._require_open()
        self._engine.build()
        keeps = not self._is_sharded or self._engine.collectives.rank == 0
        found: dict[str, Tensor] = {}
        for unit in [unit for unit in self._engine.units if unit in self._flats]:
            flat = self._flats[unit]
            if self._is_sharded:
                values = whole_values(unit, flat, self._engine.mesh)
            else:
                values = [unit.memory.view(flat, position) for position in range(len(unit.names))]
            if values is not None:
                found.update(zip(unit.names, values, strict=True))
        if not keeps:
            return {}
        found.update({self._engine.names[parameter]: value for parameter, value in self._frozen.items()})
        found.update(self._buffer_averages)
        return {alias: found[name] for alias, name in self._aliases().items() if name in found}

    def shards(self) -> dict[str, Tensor]:
        """This rank's parts of the averages of parameters, and those of buffers, by all of their names in the module.

        Parameters without an average of their own are left out: their value is the average. All ranks take part.

        Returns:
            ``Shard`` for parameters, for a checkpoint to which every rank writes its part.

        Raises:
            RuntimeError: If the engine is closed.

        """
        self._require_open()
        self._engine.build()
        made = parameter_shards(self._flats)
        found: dict[str, Tensor] = {self._engine.names[p]: shard for p, shard in made.items()}
        found.update({self._engine.names[p]: Shard.whole(value) for p, value in self._frozen.items()})
        found.update(self._buffer_averages)
        return {alias: found[name] for alias, name in self._aliases().items() if name in found}

    def _aliases(self) -> dict[str, str]:
        """All names of the module's parameters and buffers, and the first name of each."""
        module = self._engine.module
        first = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
        every = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        return {name: first[id(tensor)] for name, tensor in every}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], count: int) -> None:
        """Take over an average, one parameter at a time. All ranks take part.

        Args:
            state: Whole parameters and buffers by name, as ``state_dict`` gives them or as in a model's state dict;
                what the module does not have is passed over. On every rank, or on one and ``{}`` on the others.
            count: How many values were averaged in it.

        Raises:
            ValueError: If parameters that are averaged are missing, or of another shape; all are listed.
            RuntimeError: If the engine is closed.

        """
        self._require_open()
        engine = self._engine
        engine.build()
        collectives = engine.collectives
        everyone = collectives.gather_objects((list(state), self._problems(state) if state else []))
        problems: list[str] = next((problems for _, problems in everyone if problems), [])
        givers = [rank for rank, (names, _) in enumerate(everyone) if names]
        if problems or not givers:
            listed = "\n  ".join(problems or ["all: it is empty on every rank"])
            raise ValueError(f"Expected an average that fits the model, got one that does not:\n  {listed}")
        given = set(everyone[givers[0]][0])
        source = givers[0] if len(givers) < collectives.ranks else None

        def take(name: str, like: Tensor) -> Tensor:
            if source is None:
                return state[name]
            here = collectives.rank == source
            value = torch.empty(like.shape, dtype=like.dtype, device=collectives.device)
            if here:
                value.copy_(state[name])
            collectives.broadcast(value, source)
            return value

        for unit in engine.units:
            flat = self._flats.get(unit)
            loaded = self._copied(unit.memory.mine) if flat is None else flat
            for position, (name, parameter) in enumerate(zip(unit.names, unit.parameters, strict=True)):
                if name in given:
                    fill_part(unit, position, loaded, take(name, parameter))
            if flat is None:
                differs = not torch.equal(loaded.to(unit.memory.mine.device), unit.memory.mine)
                if collectives.agree([differs])[0]:
                    self._flats[unit] = loaded
        placed = {parameter for unit in engine.units for parameter in unit.parameters}
        for parameter, name in engine.names.items():
            if parameter not in placed and name in given:
                value = take(name, parameter).to(parameter.device)
                if parameter in self._frozen or not torch.equal(value.to(parameter.dtype), parameter):
                    self._frozen[parameter] = self._copied(value.to(parameter.dtype))
        for name, buffer in self._current_buffers():
            if name in given:
                self._buffer_averages[name].copy_(take(name, buffer))
        self.count = count

    def _problems(self, state: Mapping[str, Tensor]) -> list[str]:
        """What keeps a state from being loaded."""
        averaged = {name for unit in self._flats for name in unit.names}
        tensors = {name: parameter for parameter, name in self._engine.names.items()}
        problems = [f"missing: {name}" for name in tensors if name in averaged and name not in state]
        tensors.update(self._current_buffers())  # type: ignore[arg-type]
        return problems + [
            f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in state and state[name].shape != tensor.shape
        ]
