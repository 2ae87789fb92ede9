"""Which units there are, whose they are, and where each parameter lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_accel.core.agreement import require_same
from lightning_accel.core.dtypes import Dtypes, matrices
from lightning_accel.core.layout import Layout, balance, even_layout, owned_layout
from lightning_accel.core.low_rank import Compression
from lightning_accel.core.mesh import Mesh
from lightning_accel.core.parameter_memory import Gauge
from lightning_accel.core.partition import Group, NamedParameter, partition
from lightning_accel.core.placement import Rest, Row
from lightning_accel.core.pool import BufferPool
from lightning_accel.core.unit import Content, Unit

if TYPE_CHECKING:
    from lightning_accel.core.optimizer import EngineOptimizer


class Roster:
    """Lays parameters out in units and keeps track of them.

    A unit's parameters are of one dtype and belong to one optimizer, or to none.

    Args:
        row: The placement row.
        blocks: Modules whose parameters stay together, by name.
        cap_bytes: Size up to which small units are joined.
        mesh: The ranks.
        pool: Lends gradient buffers.
        on_host: Keep this rank's part of parameters that rest sharded in host memory.
        module: The model.
        dtypes: What it computes with and what gradients travel in.
        compression: Of gradients that all ranks have whole, if they are to be.

    """

    def __init__(
        self,
        row: Row,
        blocks: dict[str, nn.Module],
        cap_bytes: int,
        mesh: Mesh,
        pool: BufferPool,
        *,
        module: nn.Module,
        dtypes: Dtypes,
        on_host: bool = False,
        compression: Compression | None = None,
    ) -> None:
        self._on_host = on_host
        self.compression = compression
        """What PowerSGD keeps, if it is used."""
        self._dtypes = dtypes
        self._module = module
        self._matrices: set[nn.Parameter] = set()
        self._masters: dict[nn.Parameter, torch.dtype] = {}  # the dtypes that parameters came with
        self._row = row
        self._blocks = blocks
        self._cap_bytes = cap_bytes
        self._mesh = mesh
        self._pool = pool
        self.gauge = Gauge()
        self.units: list[Unit] = []
        """In launch order."""
        self.owner: dict[Unit, EngineOptimizer | None] = {}
        """The optimizer that updates a unit."""
        self.places: dict[nn.Parameter, tuple[Unit, int]] = {}
        """The unit of each trainable parameter, and the position in it."""
        self.views: dict[nn.Parameter, Tensor] = {}
        """The memory of each trainable parameter."""
        self.frozen: list[nn.Parameter] = []
        """Parameters that required no gradient when units were laid out."""

    def rebuild(
        self,
        names: Mapping[nn.Parameter, str],
        optimizers: Sequence[EngineOptimizer],
        initialise: Callable[[Sequence[Unit]], None] | None = None,
    ) -> None:
        """Lay out all parameters to train that are not in a unit of an optimizer. All ranks take part.

        Units that no optimizer had are kept if they are as they should be, else taken apart as their parameters are
        laid out anew: no more than a few units' parameters are whole at a time.

        Args:
            names: The module's parameters.
            optimizers: The optimizers so far.
            initialise: Gives parameters of new units their values, if they have none yet.

        Raises:
            ValueError: If the ranks disagree about what is trainable.

        """
        holder = {parameter: optimizer for optimizer in optimizers for parameter in optimizer.parameters()}
        loose = {p: unit for unit in self.units if self.owner[unit] is None for p in unit.parameters}
        # Frozen parameters that rest replicated stay where they are, unless they meet rounded ones without autocast.
        all_of_them = self._row.parameters is Rest.SHARDED or self._dtypes.vectors
        free = [
            NamedParameter(name, parameter)
            for parameter, name in names.items()
            if (parameter in loose or parameter not in self.places) and (parameter.requires_grad or all_of_them)
        ]
        number = {optimizer: index for index, optimizer in enumerate(optimizers)}
        lines = [
            f"parameter {named.name!r} in optimizer {number.get(holder.get(named.parameter))}"  # type: ignore[arg-type]
            + (", trainable" if named.parameter.requires_grad else ", frozen")
            for named in free
        ]
        require_same(lines, self._mesh.world, "trainable parameters")

        self._matrices = matrices(self._module)
        groups: list[tuple[Group, EngineOptimizer | None, list[NamedParameter]]] = []
        join = self._row.parameters is Rest.REPLICATED  # what is joined must be gathered together
        for group in partition(free, self._blocks, self._cap_bytes, join_blocks=join):
            kinds: dict[tuple[Any, EngineOptimizer | None, bool], list[NamedParameter]] = {}
            for named in group.members:
                key = (self._dtypes_of(named.parameter), holder.get(named.parameter), named.parameter.requires_grad)
                kinds.setdefault(key, []).append(named)
            groups += [(group, owner, kind) for (_, owner, _), kind in kinds.items()]
        owners = self._share_out(groups)
        laid, built = [], []
        for group, owner, members in groups:
            layout = self._layout(members, owners)
            unit = loose.get(members[0].parameter)
            if unit is None or not _is_as(unit, layout, members):
                for former in {loose[m.parameter]: None for m in members if m.parameter in loose}:
                    self._dissolve(former)
                    for parameter in former.parameters:
                        del loose[parameter]
                unit = self._make(group, members, layout)
                built.append(unit)
            self.owner[unit] = owner
            laid.append(unit)
        for former in {unit: None for p, unit in loose.items() if self.owner[unit] is None and unit not in laid}:
            self._dissolve(former)
        if initialise is not None:
            initialise(built)
        # Backward completes units from the last to the first.
        self.units = [*reversed(laid), *(unit for unit in self.units if unit not in laid)]
        self.places = {p: (unit, i) for unit in self.units for i, p in enumerate(unit.parameters)}
        self.views = {p: unit.memory.views[i] for p, (unit, i) in self.places.items()}
        self.frozen = [parameter for parameter in names if not parameter.requires_grad]
        if built and built[0].memory.is_sharded:
            published = self._mesh.shard.publish([unit.memory.shared for unit in built])
            for unit, source in zip(built, published, strict=True):
                unit.memory.source = source

    def _dtypes_of(self, parameter: nn.Parameter) -> tuple[torch.dtype, torch.dtype]:
        """What a parameter came with, and what the model computes with."""
        came_as = self._masters.setdefault(parameter, parameter.dtype)
        return came_as, self._dtypes.of(came_as, is_matrix=parameter in self._matrices)

    def _share_out(
        self, groups: Sequence[tuple[Group, EngineOptimizer | None, list[NamedParameter]]]
    ) -> dict[nn.Parameter, int]:
        """The rank that owns each parameter whose optimizer needs it whole, balanced over the whole model."""
        whole = [
            named.parameter
            for _, owner, members in groups
            if owner is not None and owner.whole and owner.sharded
            for named in members
        ]
        ranks = balance([parameter.numel() for parameter in whole], self._mesh.shard.ranks)
        return dict(zip(whole, ranks, strict=True))

    def _layout(self, members: Sequence[NamedParameter], owners: Mapping[nn.Parameter, int]) -> Layout:
        parameters = [named.parameter for named in members]
        ranks = self._mesh.shard.ranks
        if parameters[0] in owners:
            return owned_layout([p.numel() for p in parameters], [owners[p] for p in parameters], ranks)
        return even_layout([p.shape for p in parameters], ranks)

    def _make(self, group: Group, members: Sequence[NamedParameter], layout: Layout) -> Unit:
        parameters = [named.parameter for named in members]
        names = [named.name for named in members]
        block = None if group.block is None else self._blocks[group.block]
        return Unit(
            group.name,
            parameters,
            names,
            layout,
            self._row,
            self._mesh,
            self._pool,
            self.gauge,
            block,
            on_host=self._on_host,
            dtype=self._dtypes_of(parameters[0])[1],
            reduce_dtype=self._dtypes.reduce,
            grad_dtype=self._dtypes.grad,
            compression=self.compression,
        )

    def _dissolve(self, unit: Unit) -> None:
        """Take a unit apart that belongs to no optimizer. Gradients that it has are kept."""
        unit.reconcile()
        for position, content in enumerate(unit.content):
            if content is Content.LOCAL or (content is Content.REDUCED and unit.is_inside):
                raise RuntimeError(
                    f"Expected no accumulated gradients when parameters are given to an optimizer, but"
                    f" {unit.names[position]!r} has one. Call add_param_group or setup_optimizers after an optimizer"
                    " step, or zero the gradients first."
                )
        gradients = [unit.full_gradient(position) for position in range(len(unit.parameters))]
        unit.release()
        if unit.memory.is_sharded:
            self._mesh.shard.fence("a new layout").wait()  # others have read this rank's part: its memory may go
        for parameter, gradient in zip(unit.parameters, gradients, strict=True):
            parameter.grad = gradient
            del self.places[parameter]
            del self.views[parameter]  # it keeps the memory of the whole unit
        self.units.remove(unit)
        del self.owner[unit]


def _is_as(unit: Unit, layout: Layout, members: Sequence[NamedParameter]) -> bool:
    """Whether a unit is laid out as one of ``members`` would be."""
    wanted = [members[slot.index].parameter for slot in layout.slots]
    return unit.layout == layout and all(a is b for a, b in zip(unit.parameters, wanted, strict=True))
