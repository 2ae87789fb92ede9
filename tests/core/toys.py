"""Models, optimizers and the single-process run that engines are compared with."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_accel.core import Engine
from lightning_accel.core.checkpoint import Shard, StoredTensor

ROW_NAMES = ["ddp", "zero1", "zero2", "fsdp", "fsdp_partial"]
# Two runs in double precision that differ only in the order of sums: rounding gives about 1e-16, a bug far more.
EXACT = 1e-12


class Tanh(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """Blocks of odd width between an input and an output layer."""

    def __init__(self, width: int = 13, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(7, width)
        self.blocks = nn.ModuleList(Tanh(width) for _ in range(blocks))
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    module = make()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():  # not ``module.to``: it would make complex parameters real
            tensor.data = tensor.data.to(dtype)
    return module


def data(steps: int, ranks: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Global batches of ``2 * ranks`` samples: inputs of 7 and targets of 3 numbers."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, 2 * ranks, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(steps, 2 * ranks, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def my_share(batch: Tensor) -> Tensor:
    return batch[dist.get_rank() :: dist.get_world_size()]


def mse(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((module(x) - y) ** 2).mean()


def relative_error(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference of two parameter lists, each relative to the norm of the second."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(ours, theirs, strict=True) if b.numel()]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def live_bytes() -> int:
    """Memory behind all tensors of this process. (What the system says depends on the heap's holes and huge pages.)"""
    with torch._C.DisableTorchFunctionSubclass():
        tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not t.is_meta]
        # They have no memory of their own.
        tensors = [tensor for tensor in tensors if not isinstance(tensor, Shard | StoredTensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
    sizes: dict[int, int] = {}
    for storage in storages:
        with contextlib.suppress(RuntimeError):  # of a placeholder: it has no memory, and no address
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def settled_bytes() -> int:
    """As `live_bytes`, once it has been the same for a while.

    gloo's threads let go of a message after it arrived, and of a circle of tensors one collection may leave a part.
    """
    found: list[int] = []
    while len(found) < 5 or len(set(found[-5:])) > 1:
        gc.collect()
        found.append(live_bytes())
        time.sleep(0.02)
    return found[-1]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def prepared(
    row: str,
    make: Callable[[], nn.Module] = Net,
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    **options: Any,
) -> tuple[Engine, torch.optim.Optimizer]:
    """A model under an engine and its optimizer. The engine is built when it is first used."""
    module = build(make)
    engine = Engine(module, row, **options)
    made = optimizer(module.parameters())
    engine.add_optimizer(made)
    return engine, made


def started(
    row: str,
    make: Callable[[], nn.Module] = Net,
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    **options: Any,
) -> tuple[Engine, torch.optim.Optimizer]:
    """The same, with the engine built."""
    engine, made = prepared(row, make, optimizer, **options)
    engine.build()
    return engine, made


def train_alone(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    ranks: int,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = mse,
    accumulate: int = 1,
) -> None:
    """The single-process run on the global batch."""
    xs, ys = data(steps * accumulate, ranks, next(module.parameters()).dtype)
    for step in range(steps):
        optimizer.zero_grad()
        for i in range(step * accumulate, (step + 1) * accumulate):
            (loss(module, xs[i], ys[i]) / accumulate).backward()
        optimizer.step()


def train(
    engine: Engine,
    optimizer: torch.optim.Optimizer,
    steps: int,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = mse,
    accumulate: int = 1,
) -> None:
    """The same under an engine, each rank on its share of the global batch."""
    xs, ys = data(steps * accumulate, dist.get_world_size(), next(engine.module.parameters()).dtype)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            i = step * accumulate + micro
            with engine.forward_context():
                value = loss(engine.module, my_share(xs[i]), my_share(ys[i])) / accumulate
            with engine.no_sync() if micro < accumulate - 1 else contextlib.nullcontext():
                engine.backward(value)
        optimizer.step()


def values(engine: Engine) -> list[Tensor]:
    """The whole parameters. All ranks take part."""
    with engine.full_parameters():
        return [p.detach().clone() for p in engine.module.parameters()]


def compare(
    make: Callable[[], nn.Module],
    row: str,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    steps: int = 6,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = mse,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> float:
    """Error of an engine's parameters after some steps, relative to the single process. For ``ranks.run``."""
    alone = build(make, dtype)
    train_alone(alone, make_optimizer(alone.parameters()), steps, dist.get_world_size(), loss, accumulate)
    start = [p.detach().clone() for p in build(make, dtype).parameters()]
    assert relative_error(alone.parameters(), start) > 1e-3, "training changed nothing: the comparison is void"
    module = build(make, dtype)
    if dist.get_rank() > 0:  # the engine must overwrite it with rank 0's
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
    engine = Engine(module, row, **options)
    optimizer = make_optimizer(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, steps, loss, accumulate)
    error = relative_error(values(engine), alone.parameters())
    engine.close()
    assert relative_error(module.parameters(), alone.parameters()) == error, "closing changed values"
    return error
