"""Which gradients are reduced, and in what order, within one backward.

[Note: fixed order]
All ranks launch the same reductions in one order: reverse registration order at first, then the order in which rank 0
completed units in its first reducing backward. A unit that is ready early waits for its turn. One that is not ready at
the end of backward (unused parameters, or fewer gradients than last time) is launched then, with zeros for what this
rank does not contribute. No rank waits in the middle of backward for what another may send at its end only: the other
may never get there, because it waits for this one in a collective of the model's own (synchronised BatchNorm). Only
gloo's messages between machines have to be waited for, as they do not tell when they have arrived. Units in which
nothing requires a gradient (another optimizer is toggled on) are left out; the ranks check that they agree on which, by
a message that is under way during backward and looked at before anything is waited for.

[Note: unused parameters]
A parameter that no rank used keeps ``grad is None``: the optimizer does not touch it, weight decay and momentum
included, as on a single device. A parameter that some rank used gets the mean over all ranks. The flags are one small
message on the host at the end of each reducing backward.

[Note: late gradients]
Readiness is a count of gradient arrivals: reentrant checkpointing delivers a parameter's gradient in several parts. How
many to expect is learned from the last backward. One that arrives after its unit was launched is kept aside, and the
ranks agree on one more reduction for that unit.

[Note: borrowed gradients]
Rows that borrow gradient buffers (or what travels, see core/wire.py) bound them by the number of reductions under way:
one more unit's launch waits for the oldest. Where parameters rest replicated there may be two, besides the unit that
fills: three units of gradients, and a reduction has the backward of two units to complete. Where they rest sharded
there may be one, so two units of gradients in all, just as two units of parameters are there at once: these rows are
chosen for their memory, and the one reduction still has the backward of a whole unit to complete. In both, a rank that
finds another one late by ``_PATIENCE_S`` waits for nobody else in that backward, and borrows as many buffers as it
takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_accel.core.agreement import BufferVersions, broadcast_tensors
from lightning_accel.core.collectives import Agreement, Collectives
from lightning_accel.core.placement import Rest, Row
from lightning_accel.core.roster import Roster
from lightning_accel.core.unit import Unit
from lightning_accel.core.watching import GRADIENTS

_IN_FLIGHT = {Rest.REPLICATED: 2, Rest.SHARDED: 1}
"""Reductions under way at once in rows that borrow gradient buffers, by where parameters rest. See [Note: borrowed
gradients]."""
_PATIENCE_S = 1.0
"""How long, at most and once in a backward: a rank that takes longer may itself be waiting for this one."""


class Reduction:
    """The reductions of one backward after another.

    Args:
        row: Where gradients rest.
        roster: The units; their order is learned here.
        world: All ranks.
        buffers: The module's, which follow rank 0's.

    """

    def __init__(self, row: Row, roster: Roster, world: Collectives, buffers: BufferVersions) -> None:
        self._row = row
        self._roster = roster
        self._world = world
        self._buffers = buffers
        self.is_active = False
        """Whether the backward that runs reduces."""
        self._active: list[Unit] = []  # what this backward reduces, in launch order
        self._next = 0  # position in ``_active`` of the next launch
        self._boundary = True  # whether an optimizer step may follow
        self._patient = True  # whether this backward still waits for other ranks before it borrows more memory
        self._pattern: Agreement | None = None
        self._in_flight: list[Unit] = []
        self._completed: list[Unit] | None = []  # to learn the launch order from

    def relearn(self) -> None:
        """Learn the launch order anew: units have been laid out."""
        self._completed = []

    def begin(self, *, boundary: bool) -> None:
        """Call before backward.

        Args:
            boundary: Whether an optimizer step may follow. If not, rows that can do so send less or nothing.

        """
        units = self._roster.units
        self._boundary = boundary
        self.is_active = bool(units) and (boundary or self._row.accumulating is Rest.SHARDED)
        if self.is_active:
            # One copy's sum must become everyone's, even if nothing more comes to it.
            active = [any(p.requires_grad for p in unit.parameters) or (boundary and unit.is_inside) for unit in units]
            self._active = [unit for unit, flag in zip(units, active, strict=True) if flag]
            self._next = 0
            self._patient = True
            self._pattern = self._world.start_agreement(active)

    def ready(self, unit: Unit) -> None:
        """Call when a unit has all gradients that it expects."""
        if not self.is_active:
            return
        if self._completed is not None and unit not in self._completed:  # may be ready again, with more to come
            self._completed.append(unit)
        while self._next < len(self._active) and self._active[self._next].is_ready:
            self._launch_next()

    def _launch_next(self) -> None:
        unit = self._active[self._next]
        self._next += 1
        self._check_pattern()
        most = _IN_FLIGHT[self._row.parameters]
        if unit.borrows and len(self._in_flight) >= most and self._patient:
            with self._world.phases.within(GRADIENTS):
                self._patient = self._in_flight[0].wait_briefly(_PATIENCE_S)
                if self._patient:
                    self._in_flight.pop(0).finish()
        for earlier in self._in_flight:
            if not earlier.advance_if_ready():
                break  # second phases start in the order of the first ones
        unit.reduce(boundary=self._boundary)
        self._in_flight.append(unit)

    def _check_pattern(self) -> None:
        """Raise if the ranks are about to reduce different units. See [Note: fixed order]."""
        if self._pattern is None:
            return
        differing, self._pattern = self._pattern.differing(), None
        if differing:
            names = ", ".join(repr(self._roster.units[index].name) for index in differing)
            raise RuntimeError(
                f"Expected the same parameters to require gradients on every rank, but the ranks differ in {names}."
                " Set requires_grad, toggle optimizers and freeze layers in the same way on all ranks."
            )

    @torch.no_grad()
    def finish(self, told: Sequence[bool]) -> list[bool]:
        """Bring all reductions of this backward to their end and agree with the other ranks on what there is now.

        Args:
            told: More that the ranks are to agree on.

        Returns:
            What any rank has told; nothing if this backward does not reduce.

        """
        if not self.is_active:
            return []
        units = self._roster.units
        while self._next < len(self._active):
            self._launch_next()
        self._check_pattern()
        flags = [flag for unit in units for flag in unit.contributes]
        late = [unit.is_late for unit in units]
        agreed = self._world.agree([*flags, *late, *told, *self._buffers.changed()])
        used: dict[Unit, list[bool]] = {}
        for unit in units:
            used[unit], agreed = agreed[: len(unit.parameters)], agreed[len(unit.parameters) :]
        while self._in_flight:
            for unit in self._in_flight:
                unit.advance()
            self._in_flight.pop(0).finish()
        if self._roster.compression is not None:
            self._roster.compression.commit()
        for unit in self._active:
            unit.settle(used[unit])
        late, agreed = agreed[: len(units)], agreed[len(units) :]
        told, changed = agreed[: len(told)], agreed[len(told) :]
        for unit, is_late in zip(units, late, strict=True):
            if is_late:
                unit.reduce_late(boundary=self._boundary)
        if any(changed):
            broadcast_tensors(self._buffers.select(changed), self._world)
            self._buffers.refresh()
        if self._completed is not None and any(any(flags) for flags in used.values()):
            self._learn_order(self._completed)
            self._completed = None
        return told

    def _learn_order(self, completed: list[Unit]) -> None:
        """Launch in the order in which rank 0 completed units from now on. See [Note: fixed order]."""
        units = self._roster.units
        position = {unit: index for index, unit in enumerate(units)}
        order = self._world.gather_objects([position[unit] for unit in completed])[0]
        order += [index for index in range(len(units)) if index not in order]
        self._roster.units = [units[index] for index in order]
