"""What a step costs beside the computation: ``python -m benchmarks.overhead``.

One process, world size 1, a model of 400 parameters of 64 elements or fewer: nearly all time is Python's, hooks and
bookkeeping above all. What forward and backward take longer than those of the bare model is what hooks cost. The
optimizer step (AdamW, ``foreach``) is timed apart, as the engine gives it few and large tensors. All contestants are in
one process and are visited in turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks import page
from benchmarks.environment import describe
from benchmarks.stats import Spread, visiting_order
from lightning_accel import Accelerator
from lightning_accel.core import Engine

BLOCKS, PAIRS, WIDTH = 10, 20, 8
"""Blocks, linear layers of a block (each with a bias), and their width."""
ROWS = ("ddp", "zero1", "zero2", "fsdp_partial", "fsdp")
_STEPS = 10
_WARMUP = 5


@dataclass(frozen=True)
class Contestant:
    """Something that trains one model."""

    backward: Callable[[Tensor], None]
    """Forward and backward on a batch (rows, WIDTH)."""
    optimizer: torch.optim.Optimizer

    def step(self, x: Tensor) -> tuple[float, float]:
        """One training step; returns the seconds of forward and backward, and of the optimizer."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.backward(x)
        middle = time.perf_counter()
        self.optimizer.step()
        return middle - start, time.perf_counter() - middle


class Stack(nn.Module):
    """Blocks of tiny layers."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(PAIRS))) for _ in range(BLOCKS))
        self.blocks = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, WIDTH) to a loss."""
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def bare() -> Contestant:
    """The computation alone."""
    return _plain(Stack())


def torch_ddp() -> Contestant:
    """DistributedDataParallel, defaults."""
    return _plain(DistributedDataParallel(Stack()))


def torch_fsdp2() -> Contestant:
    """``fully_shard`` on each block and on the root."""
    model, mesh = Stack(), init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return _plain(fully_shard(model, mesh=mesh))


def accel(row: str) -> Contestant:
    """The engine under one row."""
    model = Stack()
    optimizer = _optimizer(model)
    engine = Engine(model, row)
    engine.add_optimizer(optimizer)
    engine.build()
    return Contestant(lambda x: engine.backward(model(x)), optimizer)


def accelerator_ddp() -> Contestant:
    """The engine in the manual loop's clothes: what ``Accelerator`` adds to ``accel_ddp``."""
    model = Stack()
    accelerator = Accelerator(cpu=True, strategy="accel_ddp")
    prepared, optimizer = accelerator.prepare(model, _optimizer(model))
    return Contestant(lambda x: accelerator.backward(prepared(x)), optimizer)


def fabric(strategy: str) -> Contestant:
    """Fabric around Lightning's own DDP, or around ``accel_ddp``."""
    model = Stack()
    loop = lightning.Fabric(accelerator="cpu", devices=1, strategy=strategy)
    loop.launch()
    wrapped, optimizer = loop.setup(model, _optimizer(model))
    return Contestant(lambda x: loop.backward(wrapped(x)), optimizer)


def _plain(model: nn.Module) -> Contestant:
    return Contestant(lambda x: model(x).backward(), _optimizer(model))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)


Figures = dict[str, list[tuple[float, float]]]
"""By contestant and round: seconds of forward and backward, and of the optimizer, in one step."""


def measure(rounds: int) -> Figures:
    """Visit each contestant so many times."""
    makers: dict[str, Callable[[], Contestant]] = {"bare": bare, "torch_ddp": torch_ddp, "torch_fsdp2": torch_fsdp2}
    made = {name: make() for name, make in makers.items()} | {f"accel_{row}": accel(row) for row in ROWS}
    made["accelerator_ddp"] = accelerator_ddp()
    made |= {f"fabric_{name}": fabric(name) for name in ("ddp", "accel_ddp")}
    x = torch.randn(4, WIDTH)
    for contestant in made.values():
        for _ in range(_WARMUP):
            contestant.step(x)
    found: Figures = {name: [] for name in made}
    names = list(made)
    for index in range(rounds):
        for place in visiting_order(len(names), index):
            seconds = [made[names[place]].step(x) for _ in range(_STEPS)]
            # Medians: what runs beside it interrupts single steps.
            backward, step = (statistics.median(column) for column in zip(*seconds, strict=True))
            found[names[place]].append((backward, step))
    return found


def report(found: Figures) -> str:
    """A table: forward and backward, what they take longer than the bare ones of the same round, and the optimizer."""
    parameters = 2 * BLOCKS * PAIRS
    lines = [f"{parameters} parameters, one process; ms, medians of {len(found['bare'])} rounds [quartiles]", ""]
    lines.append(f"{'':20} {'fwd+bwd':>8} {'overhead':>20} {'optimizer':>10}")
    for name, seconds in found.items():
        over = Spread.of([(own[0] - bare[0]) * 1e3 for own, bare in zip(seconds, found["bare"], strict=True)])
        backward, step = (statistics.median(column) * 1e3 for column in zip(*seconds, strict=True))
        spread = f"{over.median:.2f} [{over.lower_quartile:.2f}, {over.upper_quartile:.2f}]"
        lines.append(f"{name:20} {backward:8.2f} {spread:>20} {step:10.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="timed visits to each (default: %(default)s)")
    page.add_out(parser)
    chosen = parser.parse_args(arguments)
    header = describe("benchmarks.overhead")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1)
        try:
            found = measure(chosen.rounds)
        finally:
            dist.destroy_process_group()
    print(report(found))
    if chosen.out is not None:
        page.write(chosen.out, "overhead", report(found), found, header)


if __name__ == "__main__":
    main()
