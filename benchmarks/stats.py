"""The arithmetic between what the workers measured and what the tables show; no torch, no processes."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.config import Precision

# fp32 leaves a relative error of 6e-8 in each loss. Summing a global batch in another order moved the losses of both
# models by at most 2e-7, over 200 steps of the small one: training carries such errors along but does not amplify them
# at this learning rate and eps. Gradients off by a factor of two move the second loss by 5e-5 and more, a rank that
# trains alone by 1e-3, gradients rounded to bf16 by 3e-6 after 20 steps. Ten times the first is well below the rest.
# bf16 rounds by up to 4e-3. Under autocast peers were at most 3e-4 from the oracle; DeepSpeed, which rounds parameters
# and inputs as well, 9e-4 in a GPT and 5e-3 in the perceptron. Four times the last lets all of that pass. It finds what
# trains on other data, does not train, or runs away; a wrong factor shows in 32-true, where the same code runs.
TOLERANCES: dict[Precision, float] = {"32-true": 2e-6, "bf16-mixed": 2e-2}
"""How far a loss may be from the oracle's, relative to it, by precision."""

COMPARED_STEPS = 24
"""How many steps are compared. Later ones are not: at the 48th step of the 23M model the loss jumped for all peers, and
in one of them, up to 2e-7 from the others before, by 5e-5 more."""


@dataclass(frozen=True)
class Spread:
    """A median and how far the values lie around it."""

    median: float
    low: float
    high: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(*(values[0],) * 5)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, min(values), max(values), lower, upper)


@dataclass(frozen=True)
class LossCheck:
    """How a peer's losses compare with those it should have."""

    steps: int
    """How many steps were compared."""
    difference: float
    """The largest difference, relative to the expected loss (see ``check_losses``)."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every loss is close enough; a loss that is not a number is not."""
        return self.difference <= self.tolerance


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """The step times of a peer over those of the reference, round by round: both saw the same state of the machine."""
    return [own / other for own, other in zip(seconds, reference, strict=True)]


def over(own: Sequence[float], other: Sequence[float]) -> float:
    """How much more the median of some ratios is than that of others to the same reference, as a fraction of that."""
    return statistics.median(own) / statistics.median(other) - 1


def check_losses(runs: Sequence[Sequence[float]], expected: Sequence[float], tolerance: float) -> LossCheck:
    """Compare trajectories that all begin at step 0 with `expected`, as far as both go.

    Differences are relative to the loss, but to a tenth of the first one at least: what is left of a loss that comes
    near zero (the perceptron's, within four steps) is what rounding has left of logits that are no smaller than before.
    """
    least = abs(expected[0]) / 10 if expected else 0.0
    differences = [
        abs(loss - right) / max(abs(right), least)
        for losses in runs
        for loss, right in zip(losses, expected, strict=False)
    ]
    worst = max((float("inf") if d != d else d for d in differences), default=float("inf"))
    return LossCheck(
        steps=max((min(len(losses), len(expected)) for losses in runs), default=0),
        difference=worst,
        tolerance=tolerance,
    )


def visiting_order(count: int, round_index: int) -> list[int]:
    """The order in which a round visits `count` peers: rotated each round, and every other round backwards.

    Rotation gives every peer every place, so that none is always first; going backwards changes who comes before whom.
    """
    start = round_index % count
    order = [(start + offset) % count for offset in range(count)]
    return order[::-1] if round_index % 2 else order
