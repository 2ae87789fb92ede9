"""What one benchmark run is asked to do; the same object, but for the rank, reaches every worker process."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Precision = Literal["32-true", "bf16-mixed"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One benchmark run, seen from one rank."""

    model: str = "gpt-23m"
    """A name in `benchmarks.models.MODELS`."""
    ranks: int = 2
    """Data-parallel processes of every peer."""
    threads: int = 1
    """Compute threads of each process."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    precision: Precision = "32-true"
    """What is computed in: fp32, or bf16 with fp32 parameters to update, each peer in its own way."""
    recompute: bool = False
    """Whether the model's blocks compute their activations again in backward."""
    rounds: int = 5
    """Timed visits to every peer; a visit is one lead-in step and then `steps` timed ones."""
    steps: int = 4
    """Timed optimizer steps of one visit."""
    warmup: int = 2
    """Untimed first steps: lazy optimizer state, DDP's bucket rebuild and our learned order all settle in two."""
    saves: int = 3
    """Saves, and loads, of every peer; none if 0."""
    seed: int = 1234
    """Seeds the weights and the batches."""
    learning_rate: float = 1e-3
    epsilon: float = 1e-5
    """AdamW's eps. Not the usual 1e-8: with that, AdamW cancels any constant factor on the gradients, so a peer that
    sums where it should average would train to the very same losses. At 1e-5 such a factor shows."""
    rank: int = 0
    """The rank of the process that holds this object."""

    def public(self) -> dict[str, Any]:
        """Everything that is the same on all ranks, for the records."""
        fields = asdict(self)
        del fields["rank"]
        return fields
