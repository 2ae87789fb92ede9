"""The learning curve of a run: kept in the checkpoint, written as CSV, drawn as PNG."""

import csv
from pathlib import Path
from typing import Any

COLUMNS = ("step", "tokens", "seconds", "lr", "train_loss", "val_loss", "tokens_per_second")


class LearningCurve:
    """One row per optimizer step, and what the run has cost so far.

    It goes into the checkpoint, so that a resumed run continues the curve it stopped at, even from an older checkpoint.
    All values are plain numbers: a checkpoint that holds nothing else can be read without unpickling objects.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.tokens = 0
        """Seen by all ranks since the run was first started."""
        self.seconds = 0.0
        """Spent on them, without validation and checkpoints."""
        self._before = (0, 0.0)  # the same two, as they were when this process began

    def state_dict(self) -> dict[str, Any]:
        """All of it, for the checkpoint."""
        return {"rows": [dict(row) for row in self.rows], "tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rows = [dict(row) for row in state["rows"]]
        self.tokens, self.seconds = self._before = (state["tokens"], state["seconds"])

    def trained(self, step: int, tokens: int, seconds: float, lr: float, loss: float) -> float:
        """Record an optimizer step.

        Args:
            step: Its number, from 1.
            tokens: What all ranks together read in it.
            seconds: How long it took.
            lr: The learning rate it used.
            loss: Mean over its micro-batches and ranks, in nats per token.

        Returns:
            Tokens per second of this step.
        """
        self.tokens += tokens
        self.seconds += seconds
        self._record(step, lr=lr, train_loss=loss, tokens_per_second=round(tokens / seconds, 1))
        return tokens / seconds

    def validated(self, step: int, loss: float) -> None:
        """Record the validation loss after a step; step 0 is before the first."""
        self._record(step, val_loss=loss)

    def _record(self, step: int, **values: float) -> None:
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step, "tokens": self.tokens, "seconds": round(self.seconds, 3)})
        self.rows[-1].update(values)

    @property
    def speed(self) -> float:
        """Tokens per second of all ranks since this process began; 0 before its first step."""
        tokens, seconds = self._before
        return (self.tokens - tokens) / (self.seconds - seconds) if self.seconds > seconds else 0.0

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """A column that has gaps, as ``(tokens, values)`` where it has none."""
        rows = [row for row in self.rows if name in row]
        return [row["tokens"] for row in rows], [row[name] for row in rows]

    def summary(self) -> str:
        """First and last validation loss in one line."""
        rows = [row for row in self.rows if "val_loss" in row]
        if not rows:
            return "validation loss: not measured"
        first, last = rows[0], rows[-1]
        return (
            f"validation loss {first['val_loss']:.4f} at step {first['step']} -> "
            f"{last['val_loss']:.4f} at step {last['step']} (nats per token)"
        )

    def write_csv(self, path: Path) -> None:
        """Write all rows; what was not measured at a step stays empty."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def plot(self, path: Path, title: str) -> None:
        """Draw training and validation loss against the number of training tokens."""
        from matplotlib.figure import Figure  # slow to import, and only rank 0 draws
        from matplotlib.ticker import EngFormatter

        grey = "#52525b"
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*self.column("train_loss"), color="#7aa2e3", linewidth=0.8, label="training")
        tokens, losses = self.column("val_loss")
        axes.plot(tokens, losses, color="#c2410c", linewidth=2, marker="o", markersize=3.5, label="validation")
        if losses:
            axes.annotate(
                f"{losses[-1]:.2f}",
                (tokens[-1], losses[-1]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                color="#c2410c",
                weight="bold",
            )
        axes.set_xlabel("training tokens, all ranks", color=grey)
        axes.set_ylabel("cross-entropy (nats per token)", color=grey)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlim(left=0)
        axes.grid(color="#e4e4e7", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=grey)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.legend(frameon=False, labelcolor="linecolor")
        axes.set_title(title, loc="left", color="#18181b")
        figure.savefig(path, dpi=150)
