"""What was measured of one peer."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.stats import LossCheck

Status = Literal["valid", "invalid", "failed", "not run"]


@dataclass
class PeerResult:
    """All that was measured of one peer; lists of ranks are in rank order."""

    name: str
    family: str
    about: str
    obstacle: str | None = None
    """Why it did not run, if it was not tried; everything below is empty then."""
    failure: str | None = None
    """Why it was cut off, in one line; what had been measured by then stays, but is shown nowhere."""
    story: str | None = None
    """All that is known of the failure: tracebacks, and where ranks were that gave no answer."""
    units_per_step: int = 0
    """How many tokens or samples all ranks together train on in a step."""
    start_seconds: list[float] = field(default_factory=list)
    """Seconds from the start of the process to the end of its first step, by rank."""
    seconds: list[float] = field(default_factory=list)
    """Seconds per step of the slowest rank, by round."""
    ratios: list[float] = field(default_factory=list)
    """`seconds` over the reference's of the same round."""
    ratio_to: str | None = None
    """The peer that the ratios are taken to; another than asked for if that one has failed."""
    over_single: float | None = None
    """How much longer a step takes than single's, as a fraction of that; None if single did not run."""
    others_cpu: list[float] = field(default_factory=list)
    """The share of the whole machine that other processes took meanwhile, by round, 0 to 1."""
    peak_memory: list[int] = field(default_factory=list)
    """Bytes, by rank."""
    allocator_peak: list[int] = field(default_factory=list)
    """The most bytes that tensors have at any moment of a step, by rank; empty if its step cannot be recorded."""
    at_rest: list[dict[str, int]] = field(default_factory=list)
    """Bytes by kind, by rank."""
    wire: list[float] = field(default_factory=list)
    """Bytes sent per step, by rank."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Calls in one step of rank 0, by operator."""
    own: list[dict[str, Any] | None] = field(default_factory=list)
    """What the peer reports of itself, by rank."""
    losses: list[list[float]] = field(default_factory=list)
    """Mean losses over ranks, in nats: one trajectory, or one per run for a peer that starts anew each time."""
    check: LossCheck | None = None
    save_seconds: list[float] = field(default_factory=list)
    """Seconds of each save, of the slowest rank."""
    load_seconds: list[float] = field(default_factory=list)
    """Seconds of each load, of the slowest rank."""
    load_check: LossCheck | None = None
    """Whether the losses after a load are those after the save."""
    unsaved: str | None = None
    """Why saving and loading were not measured, in one line."""

    @property
    def status(self) -> Status:
        """Whether the figures mean anything."""
        if self.obstacle is not None:
            return "not run"
        if self.failure is not None:
            return "failed"
        return "invalid" if self.check is not None and not self.check.passed else "valid"

    def record(self) -> dict[str, Any]:
        """Everything, for the records."""
        return {"status": self.status, **asdict(self)}
