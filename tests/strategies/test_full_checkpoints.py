"""Checkpoints that are one file: what is in them, what saving sends and holds, what is left of them after a load."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from models import FEATURES, Regression, Samples, SaveAtEnd, alone, assert_close, fit, loader, on, trainer, values
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler

from core.toys import live_bytes
from harness import Ranks
from lightning_accel.core import engine_of
from lightning_accel.core.collectives import nbytes
from lightning_accel.plugins import checkpoint_io
from opened import full, full_in_fabric
from rows import everyday


def make(strategy: str, **arguments: Any) -> pl.Trainer:
    """Stock Lightning on one device for "auto", whole checkpoints for a row."""
    return alone(**arguments) if strategy == "auto" else trainer(full(strategy), **arguments)


# --------------------------------------------------------------------- content


class Peculiar(Regression):
    """A state that is more than its parameters, and not by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.net.first.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.also = self.net.last  # tied, in order before and after
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_state_dict_post_hook(_rename)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return self.scale * super().forward(x)

    def get_extra_state(self) -> Any:
        return {"made by": "Peculiar", "values": [1, 2]}

    def set_extra_state(self, state: Any) -> None:
        assert state == self.get_extra_state()


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[f"{prefix}size of scale"] = state[f"{prefix}scale"].abs()


class Trainable(Regression):
    """Saves what it trains only: the parameters themselves, as adapters are often saved."""

    def __init__(self) -> None:
        super().__init__()
        self.net.blocks.requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {f"my {name}": p for name, p in self.named_parameters() if p.requires_grad}


def save(strategy: str, kind: type[Regression], path: Path, **arguments: Any) -> None:
    used = make(strategy, callbacks=[SaveAtEnd(path)], **arguments)
    used.fit(kind(), loader())


@pytest.mark.parametrize("kind", [Peculiar, Trainable])
@pytest.mark.parametrize("row", everyday(["ddp", "zero1", "zero2", "fsdp", "fsdp_partial"]))
def test_the_file_is_that_of_a_single_process(ranks2: Ranks, row: str, kind: type[Regression], tmp_path: Path) -> None:
    save("auto", kind, tmp_path / "alone.ckpt")
    ranks2.run(save, row, kind, tmp_path / "ranks.ckpt")
    expected, found = (torch.load(tmp_path / f"{name}.ckpt")["state_dict"] for name in ("alone", "ranks"))
    assert list(found) == list(expected)
    assert type(found) is type(expected)
    assert getattr(found, "_metadata", None) == getattr(expected, "_metadata", None)
    assert_close(*({n: v.double() for n, v in s.items() if isinstance(v, Tensor)} for s in (found, expected)))
    assert [v for v in found.values() if not isinstance(v, Tensor)] == [
        v for v in expected.values() if not isinstance(v, Tensor)
    ]
    if kind is Peculiar:
        assert "scratch" not in found
        assert found["net.last.weight"].data_ptr() == found["also.weight"].data_ptr()


def save_rounded(row: str, path: Path) -> dict[str, Tensor]:
    """The precise values; in mixed precision they differ from what the model computes with."""
    module = Regression().float()
    used = make(row, precision="bf16-mixed", callbacks=[SaveAtEnd(path)])
    used.fit(module, _single_precision())
    return values(module)


def _single_precision() -> DataLoader:
    data = Samples(dtype=torch.float32)
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False))


@pytest.mark.parametrize("row", everyday(["zero1", "zero2", "fsdp", "fsdp_partial"]))
def test_mixed_precision_saves_precise_values(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    expected, _ = ranks2.run(save_rounded, row, tmp_path / "one.ckpt")
    found = torch.load(tmp_path / "one.ckpt")["state_dict"]
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_close(found, expected, tolerance=0)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in found.values())


class InValidation(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def save_in_validation(row: str, folder: Path) -> None:
    used = make(row, callbacks=[InValidation(folder / "within.ckpt"), SaveAtEnd(folder / "after.ckpt")])
    used.fit(Regression(), loader(), loader(size=16))


@pytest.mark.parametrize("row", ["zero2", "fsdp"])
def test_within_validation(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    ranks2.run(save_in_validation, row, tmp_path)
    within, after = (torch.load(tmp_path / f"{name}.ckpt") for name in ("within", "after"))
    assert_close(within["state_dict"], after["state_dict"], tolerance=0)


# -------------------------------------------------------------- bytes of saving

WIDTH = 64


class Wide(Regression):
    """Blocks that are large beside whatever else a checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(2))) for _ in range(3))
        self.double()

    def loss(self, batch: Any) -> Tensor:
        _, x, _ = batch
        x = nn.functional.pad(x, (0, WIDTH - FEATURES))
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Watch(pl.Callback):
    """Saves once, and notes what was sent for it, and the memory of tensors above that before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sent: dict[str, int] = {}
        self.expected = 0
        self.while_written: list[int] = []
        self.after = 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = engine_of(pl_module)
        optimizer = trainer.optimizers[0]
        state = [value for entry in optimizer.state.values() for value in entry.values() if value.dim()]
        parts = [piece.stop - piece.start for unit in engine.units for piece in unit.layout.pieces(*unit.part)]
        self.expected = sum(map(nbytes, state)) + 8 * sum(parts)
        engine.wait()
        engine.collectives.traffic.take()
        gc.collect()
        before = live_bytes()
        write = checkpoint_io._Stream.write

        def watched_write(stream: Any, data: Any) -> int:
            if len(data) > 8 * WIDTH:  # to look takes time
                self.while_written.append(live_bytes() - before)
            return write(stream, data)

        with mock.patch.object(checkpoint_io._Stream, "write", watched_write):
            trainer.save_checkpoint(self.path)
        gc.collect()
        self.after = live_bytes() - before
        _, self.sent = engine.collectives.traffic.take()


class Looking(Watch):
    """Has a hook that may look at the checkpoint."""

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        self.seen = [value for entry in checkpoint["optimizer_states"][0].get("state", {}).values() for value in entry]


def watched(path: Path, kind: type[Watch]) -> Watch:
    watch = kind(path)
    make("fsdp", callbacks=[watch], max_steps=2).fit(Wide(), loader())
    return watch


@pytest.mark.parametrize("kind", [Watch, Looking])
def test_saving_sends_each_part_once_and_holds_one_tensor_of_optimizer_state(
    ranks2: Ranks, kind: type[Watch], tmp_path: Path
) -> None:
    first, second = ranks2.run(watched, tmp_path / "one.ckpt", kind)
    saved = torch.load(tmp_path / "one.ckpt")
    states = [value for entry in saved["optimizer_states"][0]["state"].values() for value in entry.values()]
    states = [value for value in states if value.dim()]
    model = sum(map(nbytes, saved["state_dict"].values()))
    whole = model + sum(map(nbytes, states))
    # Which tensor is next, and that there is none: numbers of 8 bytes.
    told = {"broadcast": 8 * (len(states) + 1)} if kind is Watch else {}
    assert first.sent == {"gather": 0, **told}
    assert second.sent.pop("broadcast", 0) == 0
    assert second.sent == {"gather": second.expected}
    assert first.expected + second.expected == whole
    # Random numbers of both ranks, some kilobytes each.
    random = sum(map(nbytes, filter(torch.is_tensor, tree_leaves(saved["lightning_accel"]))))
    tensor, small = 8 * WIDTH * WIDTH, 16384
    assert small < tensor
    # On rank 0 the model, a tensor that is put together and one that is written; or all of it, if a hook may look.
    held = whole if kind is Looking else model
    assert held <= min(first.while_written)
    assert max(first.while_written) < held + random + (2 * tensor if kind is Watch else tensor) + small
    assert held + 2 * tensor + small < whole or kind is Looking
    assert second.while_written == []
    for watch in (first, second):
        assert watch.after < small
    assert (tmp_path / "one.ckpt").stat().st_size < whole + random + 2 * small


def looked_at_on_one_rank(path: Path) -> int:
    kind = Looking if int(os.environ["RANK"]) == 1 else Watch
    make("fsdp", callbacks=[kind(path)], max_steps=2).fit(Wide(), loader())
    return len(torch.load(path)["optimizer_states"][0]["state"])


def test_ranks_agree_on_whether_anybody_may_look(ranks2: Ranks, tmp_path: Path) -> None:
    assert ranks2.run(looked_at_on_one_rank, tmp_path / "one.ckpt") == [12, 12]


def test_who_asks_for_the_state_of_an_optimizer_itself_gets_it_at_once(ranks2: Ranks) -> None:
    first, second = ranks2.run(asked_directly)
    assert first > 0
    assert second == 0


class Asking(pl.Callback):
    """Asks the strategy for the state of the optimizer, without a checkpoint."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = trainer.strategy.optimizer_state(trainer.optimizers[0]).get("state", {})
        self.total = sum(float(value.sum()) for entry in state.values() for value in entry.values())


def asked_directly() -> float:
    asking = Asking()
    make("fsdp", callbacks=[asking], max_steps=2).fit(Wide(), loader())
    return asking.total


# ------------------------------------------------------------------ after a load


def mapped(path: Path) -> int:
    """How many bytes of a file this process has in its memory as that file's, and has read; -1 if it has no such."""
    found, size = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"[0-9a-f]+-[0-9a-f]+ .{4} ", line)
        if head:
            inside = line.endswith(str(path))
            found |= inside
        elif inside and line.startswith("Rss:"):
            size += 1024 * int(line.split()[1])
    return size if found else -1


class Keeping(pl.Callback):
    """A callback that keeps what it is given."""

    state: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"kept": torch.arange(1000.0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


class Maps(pl.Callback):
    """Notes whether the file is still mapped when training starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gc.collect()
        self.seen = mapped(self.path)


class OnMeta(Regression):
    def configure_model(self) -> None:
        if next(self.parameters()).is_meta:
            return
        self.to("meta")


def resume(row: str, optimizer: str, path: Path, kind: type[Regression] = Regression) -> tuple[dict[str, Tensor], int]:
    keeping, maps = Keeping(), Maps(path)
    module = kind(optimizer=optimizer)
    used = make(row, callbacks=[keeping, maps], max_epochs=4)
    used.fit(module, loader(), ckpt_path=path)
    assert keeping.state["kept"].tolist() == list(range(1000))
    return values(module), maps.seen


def stop(strategy: str, optimizer: str, path: Path) -> None:
    callbacks = [SaveAtEnd(path), Keeping()]
    make(strategy, max_epochs=2, callbacks=callbacks).fit(Regression(optimizer=optimizer), loader())


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor"])
@pytest.mark.parametrize("row", ["ddp", "zero2", "fsdp"])
def test_nothing_of_the_file_is_left_in_a_run(ranks2: Ranks, row: str, optimizer: str, tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    stop("auto", optimizer, path)
    expected, _ = on("auto", ranks2, resume, "auto", optimizer, path)[0]
    for found, seen in ranks2.run(resume, row, optimizer, path):
        assert seen == -1
        assert_close(found, expected)


def test_nothing_of_the_file_is_left_in_a_model_that_comes_without_values(ranks2: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    stop("auto", "AdamW", path)
    for found, seen in ranks2.run(resume, "fsdp", "AdamW", path, OnMeta):
        assert seen == -1
        assert_close(found, fit("auto", max_epochs=4))


def fabric_for(row: str) -> tuple[Fabric, nn.Module, torch.optim.Optimizer]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=full_in_fabric(row))
    fabric.launch()
    module = Wide().train()
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.01))
    model.mark_forward_method("loss")
    return fabric, model, optimizer


def step(fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    fabric.backward(model.loss(next(iter(loader()))))
    optimizer.step()


class Holder:
    """Keeps the state that it is given."""

    def __init__(self) -> None:
        self.held = torch.ones(5000)

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = state_dict["held"]


def load_by_fabric(row: str, path: Path) -> tuple[int, int]:
    """What of the file was read when it was loaded, and what of it is left when the state has what it asked for."""
    fabric, model, optimizer = fabric_for(row)
    step(fabric, model, optimizer)
    plain = model.module
    saved = values(plain)
    state = {"model": model, "optimizer": optimizer, "holder": Holder(), "epoch": 3, "mean": torch.ones(3000)}
    fabric.save(path, {**state, "more": torch.full((2000,), 7.0)})
    step(fabric, model, optimizer)
    io = fabric.strategy.checkpoint_io
    raw = io.load_checkpoint(path)
    read = mapped(path)
    del raw
    state.update(holder=Holder(), epoch=0, mean=torch.zeros(3000))
    rest = fabric.load(path, state)
    gc.collect()
    left = mapped(path)
    assert_close(values(plain), saved, tolerance=0)
    assert state["epoch"] == 3
    assert state["mean"].sum() == 3000
    assert state["holder"].held.sum() == 5000
    assert rest["more"].tolist() == [7.0] * 2000
    whole = fabric.load(path)
    assert mapped(path) == -1
    assert_close(whole["model"], saved, tolerance=0)
    step(fabric, model, optimizer)
    return read, left


@pytest.mark.parametrize("row", ["ddp", "zero2", "fsdp"])
def test_fabric_reads_what_it_needs_and_keeps_nothing_of_the_file(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    for read, left in ranks2.run(load_by_fabric, row, path):
        assert 0 <= read < path.stat().st_size / 4, "the names are read, not the values"
        assert left == -1
