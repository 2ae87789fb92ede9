"""``accel launch`` on two machines: network namespaces that share no sockets, joined by a virtual cable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.hosts import NIC, Hosts

pytestmark = pytest.mark.matrix

ROOT = Path(__file__).parent.parent.parent
EXACT = 1e-12  # double precision, two orders of the same sums
LAUNCH = [sys.executable, "-m", "lightning_accel.cli", "launch", "--cpu", "--num_processes", "4"]

TRAINING = """
import json, sys
import torch
from lightning.fabric import Fabric

if __name__ == "__main__":
    losses = {}
    for row in ("zero2", "fsdp", "fsdp_hybrid"):
        fabric = Fabric(strategy=f"accel_{row}")
        fabric.launch()
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1)).double()
        model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
        data = torch.randn(10, fabric.world_size, 4, 7, dtype=torch.float64)
        losses[row] = []
        for batch in data[:, fabric.global_rank]:
            optimizer.zero_grad()
            loss = (model(batch) - batch.sum(-1, keepdim=True)).square().mean()
            fabric.backward(loss)
            optimizer.step()
            losses[row].append(fabric.all_reduce(loss.detach()).item())
    with open(f"{sys.argv[1]}/{fabric.global_rank}.json", "w") as file:
        json.dump(losses, file)
"""

FAILING = """
import os, time
if os.environ["RANK"] == "3":
    raise LookupError("no more luck")
time.sleep(300)
"""

# Rank 3 fails at first; nothing of the other machine's ever would.
RESTARTED = """
import os, time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
print(f"attempt {attempt}: {int(total)} ranks", flush=True)
if attempt == "0":
    if dist.get_rank() == 3:
        raise LookupError("no more luck")
    time.sleep(300)
dist.destroy_process_group()  # else gloo may abort a process that is still exiting when its peer has gone
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(Hosts(2))
        except OSError as error:
            pytest.skip(str(error))
        yield hosts


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": "/nowhere", "OMP_NUM_THREADS": "1", **variables}


def launch(machines: Hosts, path: Path, *arguments: str, restarts: int = 0) -> list[tuple[int, str]]:
    """Run a script on both, two ranks on each; exit status and what was said."""
    meeting = ["--num_machines", "2", "--main_process_ip", machines.addresses[0], "--main_process_port", "29612"]
    meeting += ["--max_restarts", str(restarts)]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *LAUNCH, *meeting, "--machine_rank", str(number), str(path), *arguments],
            env=environment(GLOO_SOCKET_IFNAME=NIC),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, name in enumerate(machines.names)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_the_same_losses_as_on_one_machine(machines: Hosts, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TRAINING)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one = [*LAUNCH, str(tmp_path / "script.py"), str(tmp_path / "one")]
    done = subprocess.run(one, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for code, output in launch(machines, tmp_path / "script.py", str(tmp_path / "two")):
        assert code == 0, output
    for rank in range(4):
        here, there = (json.loads((tmp_path / name / f"{rank}.json").read_text()) for name in ("one", "two"))
        assert here.keys() == there.keys() == {"zero2", "fsdp", "fsdp_hybrid"}
        for row, losses in here.items():
            assert there[row] == pytest.approx(losses, rel=EXACT, abs=0)
            assert losses[-1] < losses[0]


def test_a_rank_that_fails_ends_both_machines(machines: Hosts, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FAILING)
    (first, said), (second, other) = launch(machines, tmp_path / "script.py")
    assert (first, second) == (1, 1)
    assert "Machine 0 ends, as machine 1 has given up: Rank 3 failed" in said
    assert "LookupError: no more luck" in said
    assert other.rstrip().endswith("LookupError: no more luck")
    assert "Rank 3 failed" in other


def test_all_machines_start_again(machines: Hosts, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RESTARTED)
    for code, output in launch(machines, tmp_path / "script.py", restarts=1):
        assert code == 0, output
        assert output.count("attempt 0: 4 ranks") == output.count("attempt 1: 4 ranks") == 2
