"""The examples of docs/accelerator.md run as they stand."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from harness import Ranks
from lightning_accel import Accelerator

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "accelerator.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def execute(blocks: list[str], folder: str) -> None:
    os.chdir(folder)
    os.environ["ACCEL_CPU"] = "1"
    for block in blocks:
        exec(block, {"__name__": "__main__"})


def test_examples_run(ranks2: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """16 batches of each rank are 4 steps, of 2 each of the schedule."""
    assert len(BLOCKS) == 2
    ranks2.run(execute, BLOCKS, str(tmp_path))
    assert capfd.readouterr().out == "rate: 0.0098\n"
    assert (tmp_path / "run" / "checkpoints" / "checkpoint_0" / "manifest.json").is_file()


def test_every_verb_is_mentioned() -> None:
    hidden = {"fabric", "project_dir", "logging_dir", "split_batches", "even_batches", "dispatch_batches"}
    hidden |= {"non_blocking", "mixed_precision", "step_scheduler_with_optimizer", "use_distributed"}
    public = {name for name in dir(Accelerator) if not name.startswith("_")} - hidden
    assert sorted(name for name in public if f"`{name}" not in PAGE) == []


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w.]*)\)", PAGE))
def test_links_lead_somewhere(path: str) -> None:
    assert (DOCS / path).exists()
