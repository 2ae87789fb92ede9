"""A checkpoint of which a part does not fit: one error on all ranks lists all of it, and nothing is loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from models import Net, Regression, SaveAtEnd, assert_close, loader, make, values
from torch import Tensor, nn

from harness import Ranks
from lightning_accel.strategies.fitting import prepare_all
from rows import everyday


def test_second_halves_come_in_order() -> None:
    done: list[int] = []
    for second in prepare_all([lambda: lambda: done.append(1), lambda: lambda: done.append(2)]):
        second()
    assert done == [1, 2]
    assert prepare_all([]) == []


def refuse(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("errors", "kind", "message"),
    [
        ([ValueError("one"), ValueError("two")], ValueError, "one\ntwo"),
        ([RuntimeError("one"), ValueError("two")], RuntimeError, "one\ntwo"),
        ([OSError(7, "only one")], OSError, "[Errno 7] only one"),
    ],
)
def test_all_that_does_not_fit_is_one_error(errors: list[Exception], kind: type[Exception], message: str) -> None:
    done: list[int] = []
    firsts: list[Any] = [*(partial(refuse, error) for error in errors), partial(done.append, 1)]
    with pytest.raises(kind) as caught:
        prepare_all(firsts)
    assert str(caught.value) == message
    assert type(caught.value) is kind
    assert done == [1], "what comes after is looked at, too"


# ------------------------------------------------------------------------------- Fabric


class Wider(Net):
    def __init__(self) -> None:
        super().__init__(seed=1)
        self.last = nn.Linear(5, 4, dtype=torch.float64)


def fabric_with(row: str, net: Net, groups: int = 1) -> tuple[Fabric, nn.Module, torch.optim.Optimizer]:
    """Set up and trained for a step; its first layers are one group, or a group each."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=f"accel_{row}")
    fabric.launch()
    layers = [net.first, net.blocks, net.last]
    members = [[p for layer in layers[index::groups] for p in layer.parameters()] for index in range(groups)]
    model, optimizer = fabric.setup(net, torch.optim.AdamW([{"params": some} for some in members], lr=0.01))
    fabric.backward(model(torch.ones(2, 5, dtype=torch.float64)).square().mean())
    optimizer.step()
    return fabric, model, optimizer


def fabric_save(row: str, path: Path) -> None:
    fabric, model, optimizer = fabric_with(row, Net())
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 4})


def state_of(optimizer: Any) -> dict[str, Tensor]:
    entries = optimizer.state_dict().get("state", {}).items()
    return {f"{number}.{key}": value.clone() for number, entry in entries for key, value in entry.items()}


def fabric_load(row: str, path: Path, wider: bool, groups: int) -> tuple[str, str]:
    net = Wider() if wider else Net(seed=1)
    fabric, model, optimizer = fabric_with(row, net, groups)
    before, moments = values(net), state_of(optimizer)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    with pytest.raises((ValueError, RuntimeError)) as caught:
        fabric.load(path, state)
    assert_close(values(net), before, tolerance=0)
    assert_close(state_of(optimizer), moments, tolerance=0)
    assert state["step"] == 0
    assert optimizer.param_groups[0]["lr"] == 0.01
    fabric.backward(model(torch.ones(2, 5, dtype=torch.float64)).square().mean())
    optimizer.step()  # all ranks can go on
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize(
    ("wider", "groups", "kind", "expected"),
    [
        (False, 2, "ValueError", ["fits this AdamW", "parameter groups: expected 2, got 1"]),
        (
            True,
            1,
            "RuntimeError",
            ["size mismatch for last.weight", "last.bias: 'exp_avg' has shape"],
        ),
        (True, 2, "RuntimeError", ["size mismatch for last.weight", "parameter groups: expected 2, got 1"]),
    ],
    ids=["optimizer", "model", "both"],
)
@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_fabric_changes_nothing_if_anything_does_not_fit(
    ranks2: Ranks, row: str, wider: bool, groups: int, kind: str, expected: list[str], tmp_path: Path
) -> None:
    ranks2.run(fabric_save, row, tmp_path / "it")
    for found, message in ranks2.run(fabric_load, row, tmp_path / "it", wider, groups):
        assert found == kind
        assert all(line in message for line in expected), message


# ------------------------------------------------------------------------------ Trainer


class Two(Regression):
    """Has two optimizers, the second of as many groups as it is told."""

    automatic_optimization = False

    def __init__(self, groups: int, *, seed: int = 0, lr: float = 0.1) -> None:
        super().__init__(seed=seed, lr=lr)
        self.groups = groups

    def configure_optimizers(self) -> Any:
        first, last = self.net.first.parameters(), self.net.last.parameters()
        members = [list(last)] if self.groups == 1 else [[p] for p in last]
        return [
            torch.optim.AdamW(first, lr=self.hparams["lr"]),
            torch.optim.AdamW([{"params": some} for some in members], lr=self.hparams["lr"]),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()


class Look(pl.Callback):
    """What there is when an exception has come."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.has_state = [bool(optimizer.state) for optimizer in trainer.optimizers]


def save_two(row: str, path: Path) -> None:
    make(row, callbacks=[SaveAtEnd(path)]).fit(Two(1), loader())


def resume_two(row: str, path: Path) -> tuple[str, Look]:
    look = Look()
    with pytest.raises(ValueError, match="Expected a state that fits this AdamW") as caught:
        make(row, max_epochs=3, callbacks=[look]).fit(Two(2, seed=1, lr=0.5), loader(), ckpt_path=path)
    return str(caught.value), look


@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_a_trainer_loads_all_optimizers_or_none(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    ranks2.run(save_two, row, tmp_path / "it.ckpt")
    for message, look in ranks2.run(resume_two, row, tmp_path / "it.ckpt"):
        assert "parameter groups: expected 2, got 1" in message
        assert look.rates == [0.5, 0.5, 0.5]
        assert look.has_state == [False, False]
