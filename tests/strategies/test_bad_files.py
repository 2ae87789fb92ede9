"""Checkpoint files that cannot be read or written: an error on every rank, and nothing is changed by it."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from models import Net, Regression, SaveAtEnd, alone, assert_close, loader, trainer, values
from torch import Tensor, nn

from harness import Ranks
from opened import full, full_in_fabric
from rows import everyday

EXPECTED = {
    "truncated": ("ValueError", "is incomplete"),
    "flipped": ("ValueError", "CRC-32"),
    "text": ("ValueError", "is none"),
    "folder": ("ValueError", "to be a complete checkpoint"),
    "missing": ("FileNotFoundError", "Checkpoint file not found"),
    "on rank 0 only": ("FileNotFoundError", "Checkpoint file not found"),
    "evil": ("UnpicklingError", "Nothing of it was executed"),
}


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def spoil(good: Path, name: str) -> None:
    """Make a bad file of a good one that has the bytes of a tensor of ones in it."""
    bad, whole = good.with_name(name), bytearray(good.read_bytes())
    if name == "truncated":
        bad.write_bytes(whole[:-100])
    elif name == "flipped":
        whole[whole.index(torch.ones(16).numpy().tobytes()) + 5] ^= 4
        bad.write_bytes(whole)
    elif name == "text":
        bad.write_text("state_dict: {}\n" * 20)
    elif name == "folder":
        bad.mkdir()
    elif name == "on rank 0 only":
        bad.write_bytes(whole)
    elif name == "evil":
        torch.save({**torch.load(good), "more": Evil(good.with_name("made"))}, bad)


def path_here(folder: Path, name: str) -> Path:
    absent = name == "on rank 0 only" and dist.is_initialized() and dist.get_rank() > 0
    return folder / ("somewhere else" if absent else name)


def require_expected(results: list[dict[str, tuple[str, str]]], folder: Path) -> None:
    for rank, result in enumerate(results):
        for name, (kind, message) in EXPECTED.items():
            found = result[name]
            assert found[0] == kind, (rank, name, found)
            assert message in found[1], (rank, name, found)
            if name != "on rank 0 only":
                assert str(folder / name) in found[1] or name == "missing"
        assert ("rank 1 has failed" in result["on rank 0 only"][1]) == (rank == 0)
    assert not (folder / "made").exists()


def caught(action: Any) -> tuple[str, str]:
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


# -------------------------------------------------------------------- Trainer


def make(strategy: str, **arguments: Any) -> pl.Trainer:
    """Stock Lightning on one device for "auto", whole checkpoints for a row."""
    return alone(**arguments) if strategy == "auto" else trainer(full(strategy), **arguments)


class Ones(Regression):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ones"] = torch.ones(100)


def write_by_trainer(path: Path) -> None:
    make("auto", callbacks=[SaveAtEnd(path)]).fit(Ones(), loader())


def refuse_by_trainer(row: str, folder: Path) -> dict[str, tuple[str, str]]:
    found = {}
    for number, name in enumerate(EXPECTED):
        module = Ones()
        before = values(module)
        used = make(row)
        stage = (used.fit, used.validate)[number % 2]
        found[name] = caught(lambda s=stage, m=module, n=name: s(m, loader(), ckpt_path=path_here(folder, n)))
        assert_close(values(module), before, tolerance=0)
    return found


@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_a_trainer_refuses_bad_files_on_every_rank(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    write_by_trainer(tmp_path / "good")
    for name in EXPECTED:
        spoil(tmp_path / "good", name)
    require_expected(ranks2.run(refuse_by_trainer, row, tmp_path), tmp_path)


def fit_with(path: Path, **arguments: Any) -> None:
    make("zero2").fit(Regression(), loader(), ckpt_path=path, **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.ones(3)}, "without state_dict and pytorch-lightning_version (in it are 'weight')"),
        ({"state_dict": {}, "epoch": 1}, "without pytorch-lightning_version"),
    ],
)
def test_a_file_that_no_trainer_has_written(ranks2: Ranks, content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    for error in ranks2.run_expecting_error(fit_with, tmp_path / "other.pt"):
        assert error is not None
        assert error[0] == "ValueError"
        assert "to be a checkpoint of a Lightning Trainer" in error[1]
        assert message in error[1]


def test_who_trusts_a_file_says_so(ranks2: Ranks, tmp_path: Path) -> None:
    write_by_trainer(tmp_path / "good")
    torch.save({**torch.load(tmp_path / "good"), "more": Path("a")}, tmp_path / "trusted")
    for error in ranks2.run_expecting_error(fit_with, tmp_path / "trusted"):
        assert error is not None
        assert error[0] == "UnpicklingError"
        assert "pass weights_only=False" in error[1]
    ranks2.run(fit_with, tmp_path / "trusted", weights_only=False)


def no_space(file: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fit_on_full_disk(row: str, path: Path) -> None:
    save = SaveAtEnd(path)
    used = make(row, callbacks=[save], max_epochs=3)
    with mock.patch("os.fsync", no_space if path.exists() else os.fsync):
        used.fit(Regression(), loader())


@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_a_full_disk_ends_the_run_on_every_rank_and_the_old_file_survives(
    ranks2: Ranks, row: str, tmp_path: Path
) -> None:
    path = tmp_path / "one.ckpt"
    write_by_trainer(path)
    before = path.read_bytes()
    first, second = ranks2.run_expecting_error(fit_on_full_disk, row, path)
    for error in (first, second):
        assert error is not None
        assert error[0] == "OSError"
        assert "No space left on device" in error[1]
        assert "The disk at" in error[1]
        assert str(path) in error[1]
    assert "rank 0 has failed in saving a checkpoint" in second[1]
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["one.ckpt"]


# --------------------------------------------------------------------- Fabric


def fabric_for(row: str) -> tuple[Fabric, nn.Module, nn.Module, torch.optim.Optimizer]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=full_in_fabric(row))
    fabric.launch()
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.01))
    step(fabric, model, optimizer)
    return fabric, net, model, optimizer


def step(fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    _, x, y = next(iter(loader()))
    optimizer.zero_grad()
    fabric.backward(nn.functional.mse_loss(model(x), y))
    optimizer.step()


def state_of(optimizer: Any) -> list[Tensor]:
    entries = optimizer.state_dict().get("state", {}).values()
    return [value.clone() for entry in entries for value in entry.values()]


def refuse_by_fabric(row: str, folder: Path) -> dict[str, tuple[str, str]]:
    fabric, net, model, optimizer = fabric_for(row)
    fabric.save(folder / "good", {"model": model, "optimizer": optimizer, "ones": torch.ones(100)})
    step(fabric, model, optimizer)
    if fabric.is_global_zero:
        for name in EXPECTED:
            spoil(folder / "good", name)
    fabric.barrier()
    before, moments = values(net), state_of(optimizer)
    found = {}
    for name in EXPECTED:
        state = {"model": model, "optimizer": optimizer}
        found[name] = caught(lambda n=name, s=state: fabric.load(path_here(folder, n), s))
    assert_close(values(net), before, tolerance=0)
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer), moments, strict=True))
    step(fabric, model, optimizer)  # all ranks can go on
    fabric.load(folder / "good", {"model": model, "optimizer": optimizer})
    return found


@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_fabric_refuses_bad_files_on_every_rank(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    require_expected(ranks2.run(refuse_by_fabric, row, tmp_path), tmp_path)


def save_on_full_disk(row: str, folder: Path) -> tuple[str, str]:
    fabric, net, model, optimizer = fabric_for(row)
    path, state = folder / "one.ckpt", {"model": model, "optimizer": optimizer}
    fabric.save(path, state)
    saved = values(net)
    step(fabric, model, optimizer)
    with mock.patch("os.fsync", no_space):
        error = caught(lambda: fabric.save(path, state))
    step(fabric, model, optimizer)
    fabric.save(folder / "two.ckpt", state)
    fabric.load(path, state)
    assert_close(values(net), saved, tolerance=0)
    return error


def test_fabric_goes_on_after_a_full_disk(ranks2: Ranks, tmp_path: Path) -> None:
    first, second = ranks2.run(save_on_full_disk, "fsdp", tmp_path)
    assert first[0] == second[0] == "OSError"
    assert "The disk at" in first[1]
    assert "rank 0 has failed" in second[1]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["one.ckpt", "two.ckpt"]


def save_what_cannot_be(folder: Path) -> tuple[str, str]:
    fabric, _, model, _ = fabric_for("zero2")
    return caught(lambda: fabric.save(folder / "one.ckpt", {"model": model, "bad": lambda: None}))


def test_what_cannot_be_pickled_is_an_error_on_every_rank(ranks2: Ranks, tmp_path: Path) -> None:
    first, second = ranks2.run(save_what_cannot_be, tmp_path)
    assert first[0] in (pickle.PicklingError.__name__, "AttributeError")
    assert "rank 0 has failed" in second[1]
    assert list(tmp_path.iterdir()) == []
