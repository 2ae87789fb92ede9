"""How long a peer takes to save what it trains, and to load it again.

[Note: saving] Seconds from one barrier to the next. A save ends when its files have reached the disk: each rank calls
fsync for its own, which costs nothing where the peer has done so. Each goes to a new place, and the kernel writes out
whatever else there is before. A load is warm, out of the page cache, into the model and the optimizer that are being
trained. All saves come first, then two steps that spoil what was saved, then all loads; and the same two steps once
more have to give the same losses: the first shows the parameters, the second the optimizer state.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from benchmarks.stats import LossCheck, check_losses

LOST_STEPS = 2
"""The steps between saves and loads; trained twice."""
TOLERANCE = 2e-6
"""How far losses may be from those before, in each precision: the same ranks compute the same once more."""


class Saver(Protocol):
    """What saves and loads."""

    def save(self, path: Path) -> None:
        """Save into the empty folder `path`."""

    def load(self, path: Path) -> None:
        """Load what was saved there."""


@dataclass
class Saving:
    """What was measured of one rank; all ranks see much the same, as barriers begin and end each."""

    save: list[float] = field(default_factory=list)
    """Seconds, of each save."""
    load: list[float] = field(default_factory=list)
    """Seconds, of each load."""
    check: LossCheck | None = None
    """How the losses after loading compare with those after saving."""


class Stopwatch:
    """Has a peer save and load.

    Args:
        peer: What is to save and load.
        rank: Whose rank this is.
        folder: Where to; there is nothing yet.
        times: How often.
    """

    def __init__(self, peer: Saver, rank: int, folder: Path, times: int) -> None:
        self.peer, self.rank, self.folder, self.times = peer, rank, folder, times
        self.found = Saving()

    def save(self) -> None:
        """Save, so many times."""
        for number in range(self.times):
            path = self.folder / str(number)
            if self.rank == 0:
                path.mkdir(parents=True)
                os.sync()

            def save(path: Path = path) -> None:
                self.peer.save(path)
                sync_files(path, self.rank)

            self.found.save.append(_seconds(save))
            if number and self.rank == 0:
                shutil.rmtree(self.folder / str(number - 1))

    def load(self) -> None:
        """Load the last one, so many times."""
        path = self.folder / str(self.times - 1)
        for _ in range(self.times):
            self.found.load.append(_seconds(lambda: self.peer.load(path)))
        if self.rank == 0:
            shutil.rmtree(self.folder)

    def result(self, first: float, before: Sequence[float], after: Sequence[float]) -> Saving:
        """All that was found.

        Args:
            first: The very first loss, which says what is near zero.
            before: The losses of the steps after the saves.
            after: The losses of the same steps, after the loads.
        """
        self.found.check = check_losses([[first, *after]], [first, *before], TOLERANCE)
        return self.found


def sync_files(path: Path, rank: int) -> None:
    """Have what a rank has written reach the disk, once all ranks have written."""
    dist.barrier()
    for file in files_of(path, rank):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def files_of(path: Path, rank: int) -> list[Path]:
    """The files that a rank has written: those with its number, and rank 0 those with none."""
    found = {file: re.match(r"__(\d+)_", file.name) for file in path.rglob("*") if file.is_file()}
    return [file for file, number in found.items() if (int(number[1]) if number else 0) == rank]


def _seconds(action: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start
