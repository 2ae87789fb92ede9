"""How the tests of this folder save and load engines, and compare what they have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.toys import my_share
from lightning_accel.core import Engine
from lightning_accel.core.checkpoint import Reader, Saver
from lightning_accel.core.checkpoint import shard as shard_module
from lightning_accel.core.checkpoint.engine_state import load_model, model_shards, optimizer_shards
from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.core.checkpoint.nest import put_tensors

Optimizers = list[torch.optim.Optimizer]
Read = tuple[str, int, int]
"""What was read from a file of tensors: its name, the first byte, and how many."""


class OddParameters(nn.Module):
    """Every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = nn.Parameter(torch.randn(8, 8).t() / 3)  # transposed
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.second.weight
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.conv = nn.Conv2d(3, 5, (2, 3), padding=(0, 1)).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(5, 13, dtype=torch.bfloat16))
        self.offset = nn.Parameter(torch.ones(8, dtype=torch.float32))
        self.unused = nn.Parameter(torch.randn(3))
        self.last = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = self.tied(torch.tanh(self.second(x))) * self.scale + self.frozen(x) + self.offset.double()
        x = x * self.gain.double().mean() + self.empty.sum()
        x = torch.cat([x, x, x], dim=-1).view(-1, 3, 2, 4)
        return self.last(self.conv(x).flatten(1))


class Odd(OddParameters):
    """Every kind of buffer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(3, 3))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("hidden", torch.randn(2), persistent=False)


def gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def make_engine(
    row: str,
    make: Callable[[], nn.Module],
    optimizers: Callable[[nn.Module], Optimizers],
    *,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Engine, Optimizers]:
    """A model under an engine of small units, with its optimizers.

    Args:
        row: The placement row.
        make: The model.
        optimizers: Its optimizers.
        shift: Is added to all values, so that what is not loaded is not what was saved.
        dtype: Of what the model says no other dtype for.
        options: Of the engine.

    """
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    module = make()
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.add_(int(shift) if not tensor.is_floating_point() else shift)
    engine = Engine(module, row, bucket_cap_mb=0.001, **options)
    made = optimizers(module)
    for optimizer in made:
        engine.add_optimizer(optimizer)
    engine.build()
    return engine, made


def train(engine: Engine, optimizers: Optimizers, steps: int = 2) -> None:
    """Steps on batches of which each rank takes its share: the same ones, however many ranks there are."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.get_default_dtype()
    for _ in range(steps):
        x = torch.randn(12, 7, generator=generator, dtype=dtype)
        y = torch.randn(12, 3, generator=generator, dtype=dtype)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with engine.forward_context(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = ((engine.module(my_share(x)) - my_share(y)) ** 2).mean()
        engine.backward(loss)
        for optimizer in optimizers:
            optimizer.step()


def save(engine: Engine, optimizers: Optimizers, path: str | os.PathLike[str]) -> None:
    """In chunks of a few hundred bytes, so that most tensors are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_module, "CHUNK_BYTES", 256)
        states = [optimizer_shards(engine.find_optimizer(optimizer)) for optimizer in optimizers]
        nest = {"state_dict": model_shards(engine), "optimizer_states": states}
        Saver(gather, dist.get_rank()).save(path, nest)


def load(engine: Engine, optimizers: Optimizers, path: str | os.PathLike[str]) -> Reader:
    """Load everything. Returns what has read it."""
    reader = Reader(path)
    nest = put_tensors(reader.objects(), reader.tensors())
    load_model(engine.module, nest["state_dict"], engine=engine)
    for optimizer, state in zip(optimizers, nest["optimizer_states"], strict=True):
        optimizer.load_state_dict(state)
    return reader


class _Watched:
    """A file of which it is noted what is read."""

    def __init__(self, stream: Any, name: str, reads: list[Read]) -> None:
        self._stream, self._name, self._reads = stream, name, reads

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def seek(self, offset: int) -> None:
        self._stream.seek(offset)

    def readinto(self, buffer: Any) -> int:
        start = self._stream.tell()
        length: int = self._stream.readinto(buffer)
        self._reads.append((self._name, start, length))
        return length


@contextmanager
def watched() -> Iterator[list[Read]]:
    """Within it, what this rank reads from files of tensors is noted."""
    reads: list[Read] = []
    original = Folder.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "open", lambda self, name: _Watched(original(self, name), name, reads))
        yield reads


def snapshot(engine: Engine, optimizers: Optimizers) -> dict[str, Any]:
    """Whole parameters and buffers, and whole states of optimizers, the same on all ranks. All of them take part."""
    with engine.full_parameters():
        model = {name: value.clone() for name, value in engine.module.state_dict().items() if isinstance(value, Tensor)}
    states = [gather(optimizer.state_dict())[0] for optimizer in optimizers]
    return {"model": model, "optimizers": states}


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nests differ, bit by bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return [f"{path}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"]
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other) if t.numel()]
        return [] if not bits or torch.equal(*bits) else [f"{path}: {one} and {other}"]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return [f"{path}: {sorted(map(str, one))} and {sorted(map(str, other))}"]
        return [line for key in one for line in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for index, (a, b) in pairs for line in differences(a, b, f"{path}.{index}")]
    return [] if type(one) is type(other) and one == other else [f"{path}: {one!r} and {other!r}"]
