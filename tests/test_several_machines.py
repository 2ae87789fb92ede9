"""Two machines of two ranks each: network namespaces that share no sockets, joined by a virtual cable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hosts import NIC, Hosts

TESTS = Path(__file__).parent
EXACT = 1e-12  # double precision, two orders of the same sums

ENGINE = """
import json, sys, torch, torch.distributed as dist
from core.toys import Net, adamw, build, compare, data
from lightning_accel.core import Engine

torch.set_num_threads(1)
dist.init_process_group("gloo")
found = {}
for row in ("ddp", "zero2", "fsdp", "fsdp_partial", "fsdp_hybrid"):
    error = compare(Net, row, steps=20, accumulate=2, bucket_cap_mb=0.0005)
    engine = Engine(build(Net), row)
    mesh = engine.mesh
    found[row] = [error, mesh.shard.ranks, *(type(c).__name__ for c in (mesh.shard, mesh.replicate))]
    engine.close()

engine = Engine(build(Net), "fsdp")
engine.add_optimizer(adamw(engine.module.parameters()))
engine.build()
try:
    with torch.no_grad():
        for _ in range(2 + (dist.get_rank() == 3)):
            engine.module(data(1, 1)[0][0])
    engine.close()
except RuntimeError as error:
    found["uneven"] = str(error)
with open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w") as file:
    json.dump(found, file)
"""

TRAINER = """
import sys, torch
from models import Data, Regression, trainer, values

if __name__ == "__main__":
    torch.set_num_threads(1)
    for strategy in ("accel_zero2", "accel_fsdp", "accel_fsdp_hybrid"):
        made = trainer(strategy, devices=2, num_nodes=2, max_epochs=3, gradient_clip_val=0.3)
        made.fit(module := Regression(), datamodule=Data())
        torch.save([values(module), made.strategy.engine.mesh.copies], f"{sys.argv[1]}/{strategy}.{made.global_rank}")
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(Hosts(2))
        except OSError as error:
            pytest.skip(str(error))
        yield hosts


def launch(machines: Hosts, script: str, folder: Path) -> None:
    """Run a script on all of them by torchrun, two ranks on each."""
    path = folder / "script.py"
    path.write_text(script)
    search = [str(TESTS), str(TESTS / "strategies"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": NIC,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    meeting = ["--master-addr", machines.addresses[0], "--master-port", "29511"]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *torchrun, "--node-rank", str(number), *meeting, str(path), str(folder)],
            env=environment,
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
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


@pytest.mark.matrix
def test_the_engine(machines: Hosts, tmp_path: Path) -> None:
    launch(machines, ENGINE, tmp_path)
    for rank in range(4):
        found: dict[str, Any] = json.loads((tmp_path / f"{rank}.json").read_text())
        uneven = found.pop("uneven")
        assert "Expected all ranks to do the same, but rank 0 came to the end and rank 3 to forward." in uneven
        for row, (error, ranks, shard, replicate) in found.items():
            assert error < EXACT
            if row == "fsdp_hybrid":  # by default each machine has a copy
                assert (ranks, shard, replicate) == (2, "DirectCollectives", "GlooCollectives")
            else:
                assert (ranks, shard, replicate) == (4, "GlooCollectives", "NoneType")


@pytest.mark.matrix
def test_the_trainer(machines: Hosts, tmp_path: Path) -> None:
    import torch
    from models import Regression, alone, assert_close, loader, values

    alone(max_epochs=3, gradient_clip_val=0.3).fit(module := Regression(), loader())
    launch(machines, TRAINER, tmp_path)
    for strategy in ("accel_zero2", "accel_fsdp", "accel_fsdp_hybrid"):
        for rank in range(4):
            found, copies = torch.load(tmp_path / f"{strategy}.{rank}")
            assert_close(found, values(module))
            assert copies == (2 if strategy == "accel_fsdp_hybrid" else 1)
