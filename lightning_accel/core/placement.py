"""Where each kind of model state rests: the table that makes one engine of many strategies.

A strategy is a :class:`Row`: one :class:`Rest` for the parameters, one for the gradients and one for the optimizer
state. Nothing in the engine asks for a strategy's name; it asks the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Rest(Enum):
    """Where a tensor rests between the moments at which the engine needs all of it."""

    REPLICATED = "replicated"
    """Every rank keeps the whole tensor."""
    SHARDED = "sharded"
    """Every rank keeps its own part, 1/N of the whole."""

    def fraction(self, ranks: int) -> float:
        """Share of the whole that one of ``ranks`` ranks keeps."""
        return 1.0 if self is Rest.REPLICATED else 1.0 / ranks


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the placement table."""

    name: str
    """The name after ``accel_``."""
    parameters: Rest
    """Where parameters rest between steps."""
    computing: Rest
    """Where the parameters of a block rest between its forward and its backward."""
    accumulating: Rest
    """Where gradients rest between the micro-batches of one optimizer step. Replicated: each rank adds up its own
    contributions and nothing is sent until the accumulation boundary. Sharded: every backward reduces."""
    gradients: Rest
    """Where gradients rest from the accumulation boundary until they are zeroed."""
    optimizer_state: Rest
    """Where optimizer state rests. When sharded, each rank updates its own part of the parameters."""
    hybrid: bool = False
    """Whether there are several copies of the state, each sharded over some of the ranks only. See core/mesh.py."""

    def __post_init__(self) -> None:
        assert (self.gradients is Rest.SHARDED) == (self.optimizer_state is Rest.SHARDED), "a shard updates a shard"
        assert self.parameters is Rest.SHARDED or self.computing is Rest.REPLICATED, "what rests replicated is there"
        assert self.parameters is Rest.REPLICATED or self.gradients is Rest.SHARDED, "only shards are updated"
        assert self.accumulating is Rest.REPLICATED or self.gradients is Rest.SHARDED, "a reduced shard stays a shard"
        assert self.gradients is Rest.SHARDED or not self.hybrid, "copies are of shards"

    def wire_bytes(self, parameter_bytes: int, ranks: int, backwards: int = 1, copies: int = 1) -> float:
        """Bytes that theory has one rank send in one optimizer step.

        Args:
            parameter_bytes: Size of all trainable parameters in the dtype they travel in.
            ranks: Number of ranks that divide the model state.
            backwards: Micro-batches per optimizer step.
            copies: How often the whole state is there.

        """
        part = parameter_bytes * (ranks - 1) / ranks
        across = 2 * parameter_bytes / ranks * (copies - 1) / copies
        reductions = 1 if self.accumulating is Rest.REPLICATED else backwards
        if self.parameters is Rest.REPLICATED:
            return part * (reductions + 1) + across  # the other gathers: gradients (all-reduce) or updated parameters
        # Accumulating on each rank, parameters stay until the last backward.
        gathers = (backwards if reductions == backwards else 1) * (2 if self.computing is Rest.SHARDED else 1)
        return part * (reductions + gathers) + across

    def rest_bytes(self, parameter_bytes: int, ranks: int, states_per_parameter: int = 2) -> dict[str, float]:
        """Bytes that theory has one rank keep, by kind of state.

        Args:
            parameter_bytes: Size of all trainable parameters.
            ranks: Number of ranks that divide the model state.
            states_per_parameter: Optimizer state values per parameter value (Adam: 2, SGD with momentum: 1).

        """
        # Gradients occupy the larger of their two resting places.
        gradients = max(self.accumulating.fraction(ranks), self.gradients.fraction(ranks))
        return {
            "parameters": parameter_bytes * self.parameters.fraction(ranks),
            "gradients": parameter_bytes * gradients,
            "optimizer_state": parameter_bytes * states_per_parameter * self.optimizer_state.fraction(ranks),
        }


_R, _S = Rest.REPLICATED, Rest.SHARDED

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(name="ddp", parameters=_R, computing=_R, accumulating=_R, gradients=_R, optimizer_state=_R),
        Row(name="zero1", parameters=_R, computing=_R, accumulating=_R, gradients=_S, optimizer_state=_S),
        Row(name="zero2", parameters=_R, computing=_R, accumulating=_S, gradients=_S, optimizer_state=_S),
        Row(name="zero3", parameters=_S, computing=_S, accumulating=_S, gradients=_S, optimizer_state=_S),
        Row(name="fsdp", parameters=_S, computing=_S, accumulating=_S, gradients=_S, optimizer_state=_S),
        Row(name="fsdp_partial", parameters=_S, computing=_R, accumulating=_S, gradients=_S, optimizer_state=_S),
        Row(
            name="fsdp_hybrid",
            parameters=_S,
            computing=_S,
            accumulating=_S,
            gradients=_S,
            optimizer_state=_S,
            hybrid=True,
        ),
    )
}
"""The placement table, by name."""


def find_row(name: str) -> Row:
    """The row called ``name``.

    Raises:
        ValueError: If there is no such row.

    """
    if name not in ROWS:
        raise ValueError(f"Expected one of the placement rows {', '.join(ROWS)}, got {name!r}.")
    return ROWS[name]
