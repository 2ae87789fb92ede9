"""The chart of a run: step time, memory and wire side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

from benchmarks.measure import KINDS
from benchmarks.render import MIB, largest_rank, setting
from benchmarks.result import PeerResult
from benchmarks.stats import Spread

matplotlib.use("Agg")  # draws to files, on machines without a screen too
from matplotlib import pyplot as plt  # noqa: E402

FAMILY_COLOURS = {
    "baseline": "#c3c7cf",
    "torch": "#7d8797",
    "lightning": "#a890c4",
    "accelerate": "#d9a441",
    "deepspeed": "#4f9bb3",
    "accel": "#6a35c9",
}
_KIND_COLOURS = {"parameters": "#3b6fb6", "gradients": "#e9a23b", "optimizer": "#3f9b7a", "other": "#c3c7cf"}


def draw(path: Path, header: Mapping[str, Any], results: Sequence[PeerResult]) -> None:
    """The chart: step time, memory and wire of the peers that ran, side by side, as a PNG."""
    shown = [result for result in results if result.status in ("valid", "invalid")]
    places = range(len(shown))
    names = [result.name for result in shown]
    colours = [FAMILY_COLOURS[result.family] for result in shown]
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False}
    with plt.rc_context(style):
        figure, (time, rest, wire) = plt.subplots(
            1, 3, sharey=True, figsize=(13, 1.9 + 0.42 * len(shown)), width_ratios=(1.25, 1.5, 1), layout="constrained"
        )
        spreads = [Spread.of(result.ratios) for result in shown]
        medians = [spread.median for spread in spreads]
        # Quartiles: a single round in which the machine was busy elsewhere would dwarf everything else.
        reach = [[s.median - s.lower_quartile for s in spreads], [s.upper_quartile - s.median for s in spreads]]
        hatches = ["//" if result.check is not None and not result.check.passed else "" for result in shown]
        time.barh(places, medians, color=colours, height=0.66, hatch=hatches, edgecolor="white", linewidth=0)
        time.errorbar(medians, places, xerr=reach, fmt="none", ecolor="#2b2f36", elinewidth=1.1, capsize=2.5)
        time.axvline(1.0, color="#2b2f36", linewidth=0.8, linestyle=(0, (4, 3)))
        widest = max(spread.upper_quartile for spread in spreads)
        for place, spread in zip(places, spreads, strict=True):
            time.text(
                spread.upper_quartile + 0.02 * widest, place, f"{spread.median:.2f}", va="center", color="#2b2f36"
            )
        time.set(xlim=(0, 1.14 * widest), xlabel=f"step time / {header['reference']}")
        time.set_title("Step time", loc="left", fontweight="bold")
        time.set_yticks(places, [name + " (losses wrong)" * bool(h) for name, h in zip(names, hatches, strict=True)])

        left = [0.0] * len(shown)
        for kind in KINDS:
            sizes = [largest_rank(result)[kind] / MIB for result in shown]
            rest.barh(places, sizes, left=left, color=_KIND_COLOURS[kind], height=0.66, label=kind)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
        peaks = [max(result.peak_memory) / MIB for result in shown]
        rest.plot(peaks, places, "|", color="#2b2f36", markersize=13, markeredgewidth=1.6, label="peak, measured apart")
        rest.set(xlabel="MiB per rank", xlim=(0, None))
        rest.set_title("Memory when an update is due", loc="left", fontweight="bold")
        # Below the axes, where no bar is, however many peers there are.
        figure.legend(*rest.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)

        sent = [fmean(result.wire) / MIB for result in shown]
        wire.barh(places, sent, color=colours, height=0.66)
        for place, result, size in zip(places, shown, sent, strict=True):
            calls = sum(result.collectives.values())
            label = f"{size:.1f} in {calls} calls" if calls else "nothing"
            wire.text(size + 0.02 * max(sent), place, label, va="center", color="#2b2f36")
        wire.set(xlabel="MiB sent per rank and step", xlim=(0, 1.45 * max(sent) or 1))
        wire.set_title("Wire", loc="left", fontweight="bold")

        time.invert_yaxis()
        for axes in (time, rest, wire):
            axes.tick_params(length=0)
            axes.grid(axis="x", color="#e6e8ec", linewidth=0.8)
            axes.set_axisbelow(True)
        machine = header["machine"]
        figure.suptitle(
            f"{setting(header['config'])}"
            f"  ·  {machine['processor']}, {machine['cores']} cores  ·  {header['date'][:10]}",
            x=0.01,
            ha="left",
            fontsize=11,
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)
