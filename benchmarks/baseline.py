"""Whether a run is worse than a committed one: ratios against ratios, as those can be compared between machines.

[Note: tolerance of a regression] A median of `n` rounds is itself uncertain: by 1.25 s / sqrt(n), where s is the
spread of one round, taken from the quartiles (which lie 1.35 s apart if rounds are spread normally) so that one busy
round does not count. What two such medians differ by is uncertain by both together. A ratio is worse if it is larger
than the baseline's by more than three times that, which chance alone brings about in one of some hundreds of peers; and
by more than 5 %, below which the same code differs from one start of its processes to the next.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import render
from benchmarks.result import PeerResult
from benchmarks.stats import Spread

FLOOR = 0.05
"""The least relative difference that counts."""
_SIGMAS = 3.0
_AXES = ("model", "precision", "ranks", "threads", "accumulate", "recompute")

Setting = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One peer's ratio, then and now."""

    setting: str
    name: str
    before: float
    now: float
    tolerance: float
    """How much larger `now` may be, as a fraction of `before`."""

    @property
    def worse(self) -> bool:
        """Whether it is larger by more than the tolerance."""
        return self.now > self.before * (1 + self.tolerance)

    def __str__(self) -> str:
        verdict = "worse" if self.worse else "ok"
        return (
            f"{verdict}: {self.name} ({self.setting}) {self.before:.3f} -> {self.now:.3f}, "
            f"{self.now / self.before - 1:+.1%} (at most {self.tolerance:+.1%})"
        )


def tolerance(before: Sequence[float], now: Sequence[float]) -> float:
    """How much larger the median of `now` may be than that of `before`; see [Note: tolerance of a regression]."""
    return max(FLOOR, _SIGMAS * math.hypot(_error(before), _error(now)))


def compare(
    path: Path, runs: Iterable[tuple[Mapping[str, Any], Sequence[PeerResult]]]
) -> tuple[list[Change], list[str]]:
    """Compare all that both have measured.

    Args:
        path: A ``results.jsonl``.
        runs: What has been measured now.

    Returns:
        The peers that both have, and what the baseline has and the runs should have, but have not.

    Raises:
        ValueError: If the file is no such file, or has nothing in common with the runs.
    """
    known = _read(path)
    changes, missing = [], []
    for header, results in runs:
        setting = _setting(header)
        of_setting = known.get(setting, {})
        for result in results:
            before = of_setting.get(result.name)
            if before is None or result.name == header["reference"]:
                continue
            if result.status == "valid":
                if result.ratio_to != header["reference"]:
                    missing.append(f"{result.name}: its ratios are to another peer than the baseline's")
                    continue
                changes.append(
                    Change(
                        setting=render.setting(header["config"]),
                        name=result.name,
                        before=Spread.of(before).median,
                        now=Spread.of(result.ratios).median,
                        tolerance=tolerance(before, result.ratios),
                    )
                )
            elif result.status != "not run":
                missing.append(f"{result.name}: valid in the baseline, {result.status} now")
    if not changes and not missing:
        raise ValueError(
            f"Expected {path} to have peers in common with this run (same model, precision, ranks, threads, "
            "accumulation, recomputation and reference), found none. Run with the command that is in its first line."
        )
    return changes, missing


def _read(path: Path) -> dict[Setting, dict[str, list[float]]]:
    """The ratios of valid peers, by setting and name."""
    found: dict[Setting, dict[str, list[float]]] = {}
    setting: Setting | None = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            if record["kind"] == "run":
                setting = _setting(record)
            elif record["status"] == "valid" and record["ratio_to"] == (setting or [None])[-1]:
                found.setdefault(setting or (), {})[record["name"]] = record["ratios"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected a results.jsonl of this benchmark, got {path}, line {number}: {error}"
            ) from error
    return found


def _setting(header: Mapping[str, Any]) -> Setting:
    config = header["config"]
    return (*(config[axis] for axis in _AXES), header["reference"])


def _error(values: Sequence[float]) -> float:
    """The standard error of the median, as a fraction of it."""
    spread = Spread.of(values)
    sigma = (spread.upper_quartile - spread.lower_quartile) / 1.349
    return 1.2533 * sigma / math.sqrt(len(values)) / spread.median
