"""Parameters that rest replicated, on their way from the ranks that have updated them.

After the update each unit's gather starts, and nobody waits. Until it has ended the parameters are absent (see
core/absent.py): whoever needs the values first waits for the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lightning_accel.core.absent import arrive, depart
from lightning_accel.core.collectives import Collectives
from lightning_accel.core.structure import called_by_compiled_code
from lightning_accel.core.unit import Unit
from lightning_accel.core.watching import PARAMETERS


class Arrivals:
    """The gathers under way.

    Args:
        collectives: The ranks that divide the updates among them.
        note_compiled: Called when it turns out that compiled code, of which nobody has told the engine, waits for a
            parameter; by the next step all is waited for in time.

    """

    def __init__(self, collectives: Collectives, note_compiled: Callable[[], None]) -> None:
        self._collectives = collectives
        self._note_compiled = note_compiled
        self.waits: dict[Unit, Callable[[], None]] = {}
        """For each unit that is on its way, what waits for it."""

    def start(self, units: Iterable[Unit]) -> None:
        """Start to gather what the ranks have updated."""
        for unit in units:
            self._start(unit)

    def _start(self, unit: Unit) -> None:
        pending = self._collectives.all_gather(unit.flat, unit.layout)

        def wait() -> None:
            if unit not in self.waits:
                return
            if called_by_compiled_code():
                self._note_compiled()
            with self._collectives.phases.within(PARAMETERS):
                pending.wait()  # first: if it is interrupted, the next reader waits again
            if self.waits.pop(unit, None) is not None:
                for parameter in unit.parameters:
                    arrive(parameter)

        self.waits[unit] = wait
        for parameter, name in zip(unit.parameters, unit.names, strict=True):
            depart(parameter, name, wait)

    def wait(self) -> None:
        """Wait for all of them."""
        for wait in list(self.waits.values()):
            wait()

    def abandon(self) -> None:
        """Do not wait: another rank has failed."""
        for unit in self.waits:
            for parameter in unit.parameters:
                arrive(parameter)
        self.waits.clear()
