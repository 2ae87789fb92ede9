"""Nothing that a checkpoint says is run."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same, trainer_checkpoint

from lightning_accel.convert import convert, inspect
from lightning_accel.convert.trusted import Record, load_file


class Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    return tmp_path / "was run"


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "deepspeed/mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_file_is_refused_and_not_run(tmp_path: Path, trap: Path, name: str, legacy: bool) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    checkpoint = {**trainer_checkpoint(), "module": {}, "param_shapes": None, "x": Runs(trap)}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    source = path.parent if path.parent != tmp_path else path
    for use in (lambda: inspect(source), lambda: convert(source, tmp_path / "out.ckpt")):
        with pytest.raises(ValueError, match=r"asks for .*mkdir.*Nothing of it was run"):
            use()
    assert not trap.exists()
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize("place", [".metadata", "meta.pt"])
def test_a_malicious_directory_is_refused_and_not_run(tmp_path: Path, trap: Path, place: str) -> None:
    torch.save(trainer_checkpoint(), tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "sharded", to="sharded")
    (tmp_path / "sharded" / "manifest.json").unlink()  # it is torch's own now
    if place == ".metadata":
        (tmp_path / "sharded" / place).write_bytes(pickle.dumps(Runs(trap)))
    else:
        torch.save(Runs(trap), tmp_path / "sharded" / place)
    with pytest.raises(ValueError, match=r"asks for .*mkdir.*Nothing of it was run"):
        convert(tmp_path / "sharded", tmp_path / "out.ckpt")
    assert not trap.exists()


def test_a_file_that_is_trusted_may_hold_anything(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "path": Path("x")}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="pathlib"):
        inspect(tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt", weights_only=False)
    assert torch.load(tmp_path / "b.ckpt", weights_only=False)["path"] == Path("x")


@pytest.fixture
def deepspeed_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class as DeepSpeed's checkpoints name one."""
    module = types.ModuleType("deepspeed.runtime.fp16.loss_scaler")

    class DynamicLossScaler:
        def __setstate__(self, state: dict[str, Any]) -> None:
            raise AssertionError("this is not to be called")

    DynamicLossScaler.__module__, DynamicLossScaler.__qualname__ = module.__name__, "DynamicLossScaler"
    module.DynamicLossScaler = DynamicLossScaler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for parent in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    return DynamicLossScaler


@pytest.mark.parametrize("weights_only", [True, False])
def test_records_of_deepspeed_are_read_without_their_classes(
    tmp_path: Path, deepspeed_class: type, weights_only: bool
) -> None:
    scaler = deepspeed_class()
    scaler.cur_scale = 8.0
    scaler.shape = torch.Size([2])
    torch.save({"scaler": scaler}, tmp_path / "a.pt")
    found = load_file(tmp_path / "a.pt", weights_only=weights_only)["scaler"]
    assert type(found) is Record
    assert vars(found) == {"cur_scale": 8.0, "shape": torch.Size([2])}


def test_other_classes_of_deepspeed_are_refused(tmp_path: Path, deepspeed_class: type) -> None:
    deepspeed_class.__qualname__ = "Unknown"
    sys.modules[deepspeed_class.__module__].Unknown = deepspeed_class  # type: ignore[attr-defined]
    deepspeed_class.__name__ = "Unknown"
    torch.save({"scaler": deepspeed_class()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"asks for deepspeed\.runtime\.fp16\.loss_scaler\.Unknown\. Nothing"):
        load_file(tmp_path / "a.pt")


def test_old_files_of_torch_are_read(tmp_path: Path) -> None:
    torch.save(trainer_checkpoint(), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    assert_same(torch.load(tmp_path / "new.ckpt", weights_only=True), trainer_checkpoint())


@pytest.mark.parametrize("damage", ["truncated", "other", "empty", "list"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.ckpt"
    torch.save([1, 2] if damage == "list" else trainer_checkpoint(), path)
    content = path.read_bytes()
    if damage != "list":
        path.write_bytes({"truncated": content[: len(content) // 2], "other": b"text" * 100, "empty": b""}[damage])
    with pytest.raises(ValueError, match=f"Expected {path} to"):
        inspect(path)
