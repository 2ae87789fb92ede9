"""One run under three strategies: stopped on four ranks, resumed on two, resumed on one, and drawn as one curve.

Each part is examples/train_lm.py, started anew with another strategy and another number of ranks; only the batch size
per rank changes, so that all ranks together read the same windows. A run that is never stopped is drawn beneath.

    python examples/resume_anywhere.py                 # 3 x 100 steps and 300 at a stretch, about five minutes
    python examples/resume_anywhere.py --steps 10
    python examples/resume_anywhere.py -- --dim 256    # what follows -- goes to train_lm.py
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from common import positive

GLOBAL_BATCH = 16
"""Windows of all ranks together."""


class Part(NamedTuple):
    """A strategy, and on how many ranks."""

    strategy: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.strategy}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


PARTS = (Part("accel_fsdp", 4), Part("accel_zero1", 2), Part("accel_ddp", 1))
WHOLE = Part("accel_ddp", 1)
COLOURS = ("#c2410c", "#2563eb", "#15803d")


def train(part: Part, out: Path, *arguments: str) -> None:
    """Run train_lm.py.

    Raises:
        SystemExit: If it fails; it has printed why.

    """
    print(f"\n{part}", flush=True)
    command = [sys.executable, str(Path(__file__).with_name("train_lm.py")), "--out", str(out)]
    command += ["--strategy", part.strategy, "--devices", str(part.ranks), "--generate", "0"]
    command += ["--batch-size", str(GLOBAL_BATCH // part.ranks), *arguments]
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)


def read(out: Path) -> dict[int, float]:
    """The training loss of each step, from what train_lm.py has written."""
    with (out / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]}


def plot(path: Path, resumed: dict[int, float], whole: dict[int, float], steps: int) -> None:
    """Draw the parts over the run that was not stopped, and how far they are from it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    losses, distance = figure.subplots(2, height_ratios=[3, 1], sharex=True)
    losses.plot(list(whole), list(whole.values()), color="#d4d4d8", linewidth=5, label=f"never stopped ({WHOLE})")
    for number, (part, colour) in enumerate(zip(PARTS, COLOURS, strict=True)):
        its = [step for step in resumed if number * steps < step <= (number + 1) * steps]
        losses.plot(its, [resumed[step] for step in its], color=colour, linewidth=1, label=str(part))
        distance.plot(its, [max(1e-9, abs(resumed[step] - whole[step])) for step in its], color=colour, linewidth=1)
        if number:
            losses.axvline(number * steps, color="#a1a1aa", linewidth=0.8, linestyle=":")
    distance.set_yscale("log")
    distance.set_ylabel("difference")
    distance.set_xlabel("optimizer steps")
    losses.set_ylabel("cross-entropy (nats per token)")
    losses.set_title("One run, resumed under other strategies on other numbers of ranks", loc="left")
    losses.legend(frameon=False)
    for axes in (losses, distance):
        axes.grid(color="#e4e4e7", linewidth=0.8)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train in parts and at a stretch, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=100, help="optimizer steps of each part (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("runs/resume_anywhere"), help="folder for what is written")
    parser.add_argument("train_lm", nargs="*", metavar="ARGUMENT", help="for train_lm.py, after --")
    args = parser.parse_args()
    total = str(args.steps * len(PARTS))
    for number, part in enumerate(PARTS, start=1):
        stop = ("--max-steps", total, "--stop-at", str(number * args.steps))
        train(part, args.out / "parts", *args.train_lm, *stop, *(("--resume",) if number > 1 else ()))
    train(WHOLE, args.out / "whole", *args.train_lm, "--max-steps", total)
    resumed, whole = read(args.out / "parts"), read(args.out / "whole")
    if resumed.keys() != whole.keys():
        sys.exit(f"expected the losses of {len(whole)} steps, got those of {len(resumed)}")
    plot(args.out / "curve.png", resumed, whole, args.steps)
    largest = max(abs(resumed[step] - whole[step]) for step in whole)
    print(
        f"\n{' -> '.join(map(str, PARTS))}: loss {resumed[1]:.4f} -> {resumed[int(total)]:.4f}, never further than"
        f" {largest:.1e} from the run that was not stopped\n{args.out / 'curve.png'}"
    )


if __name__ == "__main__":
    main()
