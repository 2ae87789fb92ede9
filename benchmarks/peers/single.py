"""One process, no communication."""

from pathlib import Path

import torch

from benchmarks.models import Batch, build_optimizer
from benchmarks.peers.base import Peer


class Single(Peer):
    """The computation alone; it runs on every rank at once, so that the machine is as loaded as with the others."""

    def wrap(self) -> None:
        """The module as it is."""
        self.model = self.module
        self.optimizer = build_optimizer(self.module.parameters(), self.config)

    def save(self, path: Path) -> None:
        """``torch.save`` on each rank, as each trains another copy."""
        torch.save(self.state(), self._file(path))

    def load(self, path: Path) -> None:
        """Its own file."""
        self.load_file(self._file(path))

    def _file(self, path: Path) -> Path:
        return path / f"__{self.config.rank}_.pt"


class Oracle(Single):
    """One process that sees the batches of all ranks: what every data-parallel peer has to be equal to."""

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of all ranks, joined."""
        return self.batches.of_all_ranks(step)
