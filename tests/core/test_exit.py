"""A rank that comes to its end must not take from the others what they still need."""

import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, time
sys.modules["lightning"] = None  # takes seconds to import, and the core does without
import torch
import torch.distributed as dist
from lightning_accel.core import Engine

row, rank, store, how = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
module = torch.nn.Linear(4, 4)
engine = Engine(module, row)
optimizer = torch.optim.SGD(module.parameters(), 0.1)
engine.add_optimizer(optimizer)
engine.backward(module(torch.ones(2, 4)).sum())
optimizer.step()
if rank == 1:
    time.sleep(1.5)
    with torch.no_grad():
        print("rank 1 used its parameters:", module(torch.ones(1, 4)).shape[1])
elif how == "fails":
    raise LookupError("no more luck")
if how == "destroys":
    dist.destroy_process_group()
"""


def run(tmp_path, row, how):
    begin = time.monotonic()
    arguments = [sys.executable, "-c", SCRIPT, row]
    ranks = [
        subprocess.Popen([*arguments, str(rank), str(tmp_path / "store"), how], stdout=-1, stderr=-1, text=True)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in ranks]
    return [process.returncode for process in ranks], outputs, time.monotonic() - begin


@pytest.mark.parametrize(
    ("row", "how"),
    [
        ("fsdp", "ends"),
        *(
            pytest.param(*c, marks=pytest.mark.matrix)
            for c in [("fsdp", "destroys"), ("zero2", "ends"), ("zero2", "destroys")]
        ),
    ],
)
def test_the_first_to_exit_leaves_the_others_what_they_need(tmp_path, row, how):
    codes, ((_, first), (found, second)), _ = run(tmp_path, row, how)
    assert codes == [0, 0], first + second
    assert "rank 1 used its parameters: 4" in found


def test_a_rank_that_fails_does_not_wait_for_the_others(tmp_path):
    (code, _), ((_, error), _), took = run(tmp_path, "fsdp", "fails")
    assert code == 1
    assert "LookupError: no more luck" in error
    assert took < 60
