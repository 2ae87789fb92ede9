"""What `inspect` says about each format."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import Net, trainer_checkpoint

from lightning_accel import __version__
from lightning_accel.convert import TensorSummary, convert, inspect
from lightning_accel.core.checkpoint.reader import Reader


def test_every_format_says_the_same_of_the_model(tmp_path: Path) -> None:
    torch.save(trainer_checkpoint(), tmp_path / "last.ckpt")
    convert(tmp_path / "last.ckpt", tmp_path / "sharded", to="sharded")
    convert(tmp_path / "sharded", tmp_path / "model.safetensors")
    convert(tmp_path / "sharded", tmp_path / "hf", to="safetensors", max_shard_size=400)
    expected = {TensorSummary(name, tuple(value.shape), value.dtype) for name, value in Net().state_dict().items()}
    for name, written_by in {
        "last.ckpt": "Lightning 2.6.0",
        "sharded": f"lightning-accel {__version__} (converted from Lightning 2.6.0, torch {torch.__version__}, ",
        "model.safetensors": f"lightning-accel {__version__}",
        "hf": f"lightning-accel {__version__}",
    }.items():
        summary = inspect(tmp_path / name)
        assert set(summary.tensors) == expected, name
        assert len(summary.tensors) == len(expected)
        assert summary.writer.startswith(written_by)
        assert (summary.epoch, summary.step) == (1, 3)
        files = [tmp_path / name] if (tmp_path / name).is_file() else list((tmp_path / name).iterdir())
        assert summary.disk_bytes == sum(file.stat().st_size for file in files)


def test_optimizers_and_the_rest(tmp_path: Path) -> None:
    checkpoint = trainer_checkpoint()
    torch.save(checkpoint, tmp_path / "last.ckpt")
    summary = inspect(tmp_path / "last.ckpt")
    (optimizer,) = summary.optimizers
    assert (optimizer.name, optimizer.groups, optimizer.parameters, optimizer.by_name) == (
        *("optimizer_states.0", 2, 6, False),
    )
    assert optimizer.states["3"] == [
        TensorSummary("step", (), torch.float32),
        TensorSummary("exp_avg", (7, 5), torch.float32),
        TensorSummary("exp_avg_sq", (7, 5), torch.float32),
    ]
    assert summary.others == [
        *("pytorch-lightning_version", "lr_schedulers", "loops", "callbacks", "hyper_parameters"),
    ]
    tensors = [*checkpoint["state_dict"].values()]
    tensors += [value for state in checkpoint["optimizer_states"][0]["state"].values() for value in state.values()]
    assert summary.tensor_bytes == sum(tensor.nbytes for tensor in tensors)


def test_several_models_are_told_apart(tmp_path: Path) -> None:
    torch.save({"one": {"w": torch.ones(2)}, "two": {"w": torch.ones(3)}, "step": 4}, tmp_path / "gan.ckpt")
    summary = inspect(tmp_path / "gan.ckpt")
    assert [entry.name for entry in summary.tensors] == ["one.w", "two.w"]
    assert summary.step == 4


def test_no_values_are_read(tmp_path: Path, monkeypatch) -> None:
    torch.save({"state_dict": {"w": torch.ones(3000, 3)}}, tmp_path / "last.ckpt")
    convert(tmp_path / "last.ckpt", tmp_path / "sharded", to="sharded")
    monkeypatch.setattr(Reader, "fill", None)
    assert inspect(tmp_path / "sharded").tensors == [TensorSummary("w", (3000, 3), torch.float32)]
