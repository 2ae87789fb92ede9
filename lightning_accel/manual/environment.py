"""Which rank this process is: what `torchrun` and `accel launch` have told its environment. Nothing is started here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.utilities.rank_zero import rank_zero_only
from typing_extensions import override

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def flag(name: str, environment: Mapping[str, str] | None = None) -> bool:
    """A variable that is on or off; off if it is not set.

    Raises:
        ValueError: If it is neither.

    """
    value = (os.environ if environment is None else environment).get(name, "").strip().lower()
    if value in (*_TRUE, *_FALSE):
        return value in _TRUE
    raise ValueError(f"Expected {name} to be one of {', '.join(_TRUE)} or {', '.join(_FALSE[1:])}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all of them."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1
    """How many of them are on this machine."""

    @property
    def machine(self) -> int:
        """Which machine this is."""
        return self.rank // self.local_ranks

    @property
    def machines(self) -> int:
        """How many machines there are."""
        return self.ranks // self.local_ranks

    @classmethod
    def found(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """What the environment says: one process if it says nothing.

        Args:
            environment: ``os.environ`` if not given.

        Raises:
            ValueError: If what it says is incomplete, or cannot be.

        """
        given = os.environ if environment is None else environment
        if "RANK" not in given and environment is None and dist.is_available() and dist.is_initialized():
            rank, ranks = dist.get_rank(), dist.get_world_size()  # the user has formed the group himself
            local_ranks = number(given, "LOCAL_WORLD_SIZE", ranks)
            return cls(rank=rank, ranks=ranks, local_rank=rank % local_ranks, local_ranks=local_ranks)._checked()
        if "RANK" not in given:
            if number(given, "WORLD_SIZE", 1) > 1:
                raise ValueError(
                    f"Expected RANK in the environment beside WORLD_SIZE={given['WORLD_SIZE']}. Start the script with"
                    " `accel launch` or `torchrun`, or unset WORLD_SIZE to run a single process."
                )
            return cls()
        if "WORLD_SIZE" not in given:
            raise ValueError(
                f"Expected WORLD_SIZE in the environment beside RANK={given['RANK']}. Start the script with"
                " `accel launch` or `torchrun`, or unset RANK to run a single process."
            )
        rank, ranks = number(given, "RANK", 0), number(given, "WORLD_SIZE", 1)
        local_ranks = number(given, "LOCAL_WORLD_SIZE", ranks)
        local_rank = number(given, "LOCAL_RANK", rank % max(1, local_ranks))
        found = cls(rank=rank, ranks=ranks, local_rank=local_rank, local_ranks=local_ranks)._checked()
        is_formed = environment is None and dist.is_available() and dist.is_initialized()
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if ranks > 1 and name not in given]
        if missing and not is_formed:
            raise ValueError(
                f"Expected {' and '.join(missing)} in the environment of one of {ranks} ranks: where rank 0 is to be"
                " reached. `accel launch` and `torchrun` set it."
            )
        return found

    def _checked(self) -> Ranks:
        fits = self.ranks > 0 and self.local_ranks > 0 and 0 <= self.rank < self.ranks
        if not fits or self.ranks % self.local_ranks or self.local_rank != self.rank % self.local_ranks:
            raise ValueError(
                "Expected RANK < WORLD_SIZE, as many ranks on each machine, and LOCAL_RANK = RANK % LOCAL_WORLD_SIZE;"
                f" got RANK={self.rank}, WORLD_SIZE={self.ranks}, LOCAL_RANK={self.local_rank},"
                f" LOCAL_WORLD_SIZE={self.local_ranks}."
            )
        return self


def number(environment: Mapping[str, str], name: str, default: int) -> int:
    """A variable that is a whole number.

    Args:
        environment: The variables.
        name: Of the variable.
        default: If it is not set.

    Raises:
        ValueError: If it is none.

    """
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"Expected {name} in the environment to be a number, got {text!r}.") from None


class GivenRanks(ClusterEnvironment):
    """For Fabric: the ranks are there already, none is to be started.

    Args:
        ranks: This process.

    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self._port: int | None = None

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    @override
    def main_port(self) -> int:
        if self._port is None:
            # Without RANK nobody waits at a port, whatever an earlier run in this process has left there.
            told = {"RANK", "MASTER_PORT"} <= os.environ.keys()
            self._port = int(os.environ["MASTER_PORT"]) if told else find_free_network_port()
        return self._port

    @staticmethod
    @override
    def detect() -> bool:
        return False

    @override
    def world_size(self) -> int:
        return self.ranks.ranks

    @override
    def set_world_size(self, size: int) -> None:
        assert size == self.ranks.ranks

    @override
    def global_rank(self) -> int:
        return self.ranks.rank

    @override
    def set_global_rank(self, rank: int) -> None:
        assert rank == self.ranks.rank
        rank_zero_only.rank = rank  # type: ignore[attr-defined]

    @override
    def local_rank(self) -> int:
        return self.ranks.local_rank

    @override
    def node_rank(self) -> int:
        return self.ranks.machine
