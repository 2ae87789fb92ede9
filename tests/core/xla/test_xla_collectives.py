"""Which collectives are in the compiled programs: read from what XLA writes down of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.xla

# One step of accumulation, one of the optimizer, each a program. SGD, so that there is no state to be made first.
SCRIPT = """
import sys
import torch
from torch import nn
from lightning_accel.core.xla import XLAEngine

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))

model = nn.Sequential(*(Block() for _ in range(3)))
engine = XLAEngine(model, sys.argv[1], shard_size=2 if sys.argv[1] == "fsdp_hybrid" else None)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine.add_optimizer(optimizer)
with engine.no_sync():
    engine.backward(model(engine.put_batch(torch.ones(8, 16))).square().sum())
engine.backward(model(engine.put_batch(torch.ones(8, 16))).square().sum())
optimizer.step()
"""
PARAMETERS = 12
# What gives a scalar is left out: the loss, which is still there when the first program is cut off.
_COLLECTIVE = re.compile(
    r"= \w+\[[\d,]+\]\S* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def programs(row: str, folder: Path) -> list[Counter[str]]:
    """The collectives of each program that has any, the smaller program first."""
    subprocess.run(
        [sys.executable, "-c", SCRIPT, row],
        check=True,
        timeout=200,
        env={**os.environ, "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text"},
    )
    texts = [path.read_text() for path in folder.glob("*SyncTensorsGraph*after_optimizations.txt")]
    found = [Counter(_COLLECTIVE.findall(text)) for text in sorted(texts, key=len)]
    return [counts for counts in found if counts]


@pytest.mark.parametrize(
    ("row", "accumulating", "stepping"),
    [
        # The CPU's compiler has no reduce-scatter: it reduces, and takes its part.
        ("ddp", {"all-reduce": PARAMETERS}, {"all-reduce": PARAMETERS}),
        ("zero1", {"all-reduce": PARAMETERS}, {"all-reduce": PARAMETERS, "all-gather": PARAMETERS}),
        ("zero2", {"all-reduce": PARAMETERS}, {"all-reduce": PARAMETERS, "all-gather": PARAMETERS}),
        (
            "fsdp",
            {"all-reduce": PARAMETERS, "all-gather": PARAMETERS},
            {"all-reduce": PARAMETERS, "all-gather": PARAMETERS},
        ),
    ],
)
def test_programs_send_what_the_row_says(
    row: str, accumulating: dict[str, int], stepping: dict[str, int], tmp_path: Path
) -> None:
    assert programs(row, tmp_path) == [accumulating, stepping]
