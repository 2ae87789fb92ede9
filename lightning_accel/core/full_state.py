"""Whole values on rank 0 alone, for checkpoints that are one file.

::

    rank 0    |= mine =|                   host memory  |=== a ===|== b ==|= c =| ...    one parameter after the other
    rank 1             |= mine =|               nothing
    rank 2                      |= mine =|      nothing

What no rank has whole is sent to rank 0, parameter by parameter: this rank's part once, instead of once to each other
rank. It is put together in host memory (on another device than the CPU in that device's memory first, one parameter at
a time). Whatever is whole on all ranks anyway stays where it is.

[Note: shown, not returned]
What a ``state_dict`` holds, under which names and in which order, is up to the module: hooks, overridden methods,
adapters. So nothing is put together here but values. While a module is asked for its state, its parameters have these:
on rank 0 the whole ones, on the others zeros that take no memory, so that all ranks run the same code. A parameter
stays the same object, and tied ones stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lightning_accel.core.collectives import Collectives
from lightning_accel.core.layout import Layout
from lightning_accel.core.mesh import Mesh
from lightning_accel.core.unit import Unit


@contextmanager
def collected(units: Sequence[Unit], mesh: Mesh, is_shown: Callable[[Unit], bool]) -> Iterator[bool]:
    """Within it, parameters have their whole values on rank 0. All ranks enter and leave it together.

    Args:
        units: The units of the parameters.
        mesh: The ranks.
        is_shown: Whether all ranks have a unit's whole values for now, and perhaps changed.

    Yields:
        Whether the values are right on this rank: on rank 0, and on the others if they were at rest.

    """
    collecting = [unit for unit in units if unit.memory.is_sharded or unit.memory.has_master]
    with ExitStack() as stack:
        for unit in collecting:
            if not is_shown(unit):
                values = whole_values(unit, unit.memory.mine, mesh)
            elif mesh.world.rank == 0:
                values = [parameter.detach().to("cpu", copy=True) for parameter in unit.parameters]
            else:
                values = None
            stack.enter_context(unit.memory.standing_in(_nothing(unit) if values is None else values))
            del values
        yield mesh.world.rank == 0 or not collecting


def _nothing(unit: Unit) -> list[Tensor]:
    """Zeros in place of a unit's parameters. They take no memory."""
    return [torch.zeros((), dtype=unit.memory.master_dtype).expand(parameter.shape) for parameter in unit.parameters]


def whole_values(unit: Unit, mine: Tensor, mesh: Mesh) -> list[Tensor] | None:
    """Whole tensors that are laid out as a unit's parameters, from the ranks' parts. All ranks take part.

    Args:
        unit: Its layout says which element lies where.
        mine: This rank's part, 1-D, on any device.
        mesh: The ranks.

    Returns:
        On rank 0 one tensor for each parameter, in host memory; None on the others.

    """
    if not mesh.is_first_copy:
        return None
    first, _ = unit.part
    pieces = {piece.slot: piece for piece in unit.layout.pieces(*unit.part)}
    found = []
    for position, (slot, parameter) in enumerate(zip(unit.layout.slots, unit.parameters, strict=True)):
        cuts = (min(max(cut, slot.start), slot.stop) - slot.start for cut in unit.layout.cuts)
        piece = pieces.get(position)
        part = mine[:0] if piece is None else mine[piece.start - first : piece.stop - first]
        whole = put_together(part, Layout((), tuple(cuts)), mesh.shard)
        if whole is not None:
            found.append(whole.as_strided(parameter.shape, unit.memory.strides[position]))
    return found if mesh.shard.rank == 0 else None


def put_together(part: Tensor, layout: Layout, ranks: Collectives) -> Tensor | None:
    """A whole buffer from the ranks' parts. All of them take part.

    Args:
        part: This rank's, 1-D, on any device.
        layout: How the buffer is divided.
        ranks: The ranks.

    Returns:
        On rank 0 the buffer, 1-D, in host memory; None on the others.

    """
    whole = torch.empty(layout.total, dtype=part.dtype, device=ranks.device) if ranks.rank == 0 else None
    ranks.gather(part.to(ranks.device), layout, whole)
    return None if whole is None else whole.cpu()
