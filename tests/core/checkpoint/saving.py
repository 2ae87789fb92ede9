"""What all ranks save together in tests, and ways in which one of them fails."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_accel.core.checkpoint import Saver, Shard, load
from lightning_accel.core.checkpoint.folder import Folder


def gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def make_saver() -> Saver:
    return Saver(gather, dist.get_rank())


def part(numel: int = 50_000, value: float = 0.0) -> Shard:
    """This rank's part of a tensor that is divided evenly."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine = torch.full((numel // ranks,), value + rank)
    return Shard.of_range((numel,), (1,), rank * len(mine), mine)


def nest(value: float = 0.0) -> dict[str, Any]:
    return {"state_dict": {"w": part(value=value)}, "number": value}


def expected(value: float, ranks: int = 2, numel: int = 50_000) -> Tensor:
    return torch.cat([torch.full((numel // ranks,), value + rank) for rank in range(ranks)])


def require(path: Path, value: float, ranks: int = 2) -> None:
    found = load(path)
    assert found["number"] == value
    assert torch.equal(found["state_dict"]["w"].full(), expected(value, ranks))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def is_rank(rank: int) -> bool:
    return dist.get_rank() == rank


def attempt(do: Callable[[], Any]) -> tuple[str, str] | None:
    """What a rank has raised. That its peers answer afterwards shows that none is ahead of the others."""
    outcome = None
    try:
        do()
    except Exception as error:
        outcome = type(error).__name__, str(error)
    assert gather("here") == ["here"] * dist.get_world_size()
    return outcome


@contextmanager
def full_disk(on: int, after: int = 100_000) -> Iterator[None]:
    """The disk of a rank takes so many bytes and no more."""

    class Full:
        def __init__(self, stream: IO[bytes]) -> None:
            self.stream, self.left = stream, after

        def write(self, content: Any) -> int:
            self.left -= memoryview(content).nbytes
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.stream.write(content)

        def flush(self) -> None:
            self.stream.flush()

    create = Folder.create

    @contextmanager
    def limited(self: Folder, name: str) -> Iterator[Any]:
        with create(self, name) as stream:
            yield Full(stream) if name.startswith(f"__{on}_") else stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "create", limited)
        yield
