"""From each format to each other and back: nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Net, assert_same, step, tied, trained, trainer_checkpoint
from lightning.pytorch import LightningModule
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_accel.convert import convert
from lightning_accel.core.checkpoint import load

NUMBERS = {"embedding.weight": 3, "first.bias": 0, "first.weight": 4, "norm.bias": 2, "norm.weight": 1}


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    torch.save(trainer_checkpoint(), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_ckpt_to_sharded_and_back(ckpt: Path, tmp_path: Path) -> None:
    result = convert(ckpt, tmp_path / "sharded", to="sharded")
    assert result.left_out == []
    nest = load(tmp_path / "sharded")
    assert_same(nest, trainer_checkpoint())
    assert tied(nest["state_dict"], "embedding.weight", "head.weight")

    convert(tmp_path / "sharded", tmp_path / "again.ckpt")
    assert_same(read(tmp_path / "again.ckpt"), trainer_checkpoint())
    assert tied(read(tmp_path / "again.ckpt")["state_dict"], "embedding.weight", "head.weight")


def test_every_tensor_of_model_and_optimizer_is_one_for_torch(ckpt: Path, tmp_path: Path) -> None:
    """Small ones would otherwise lie with the objects, where torch.distributed.checkpoint does not look."""
    convert(ckpt, tmp_path / "sharded", to="sharded")
    names = FileSystemReader(tmp_path / "sharded").read_metadata().state_dict_metadata
    # Single numbers (steps of the optimizer, a buffer) are with the objects, as in directories of the strategies.
    expected = {f"state_dict.{name}" for name in Net().state_dict() if name != "steps"}
    assert {name for name in names if name.startswith("state_dict.")} == expected
    assert {f"optimizer_states.0.state.{index}.exp_avg_sq" for index in range(6)} <= set(names)
    dcp_to_torch_save(tmp_path / "sharded", tmp_path / "torch.pt")
    found = torch.load(tmp_path / "torch.pt", weights_only=True)
    assert_same(found["state_dict"]["first.weight"], trainer_checkpoint()["state_dict"]["first.weight"])


def test_optimizer_names_become_the_numbers_of_their_places(tmp_path: Path) -> None:
    """torch numbers the parameters of the first group, then those of the second."""
    checkpoint = trainer_checkpoint()
    state = checkpoint["optimizer_states"][0]
    names = ["first.bias", "norm.weight", "norm.bias", "embedding.weight", "first.weight", "second.weight"]
    named = {
        "state": {names[index]: entry for index, entry in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]
        ],
    }
    torch.save({**checkpoint, "optimizer_states": [named], "fabric's": named}, tmp_path / "named.ckpt")
    convert(tmp_path / "named.ckpt", tmp_path / "sharded", to="sharded")
    assert_same(load(tmp_path / "sharded")["optimizer_states"], [named])
    convert(tmp_path / "sharded", tmp_path / "numbered.ckpt")
    found = read(tmp_path / "numbered.ckpt")
    assert_same(found["optimizer_states"], [state])
    assert_same(found["fabric's"], state)


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_model_to_safetensors_and_back(ckpt: Path, tmp_path: Path, name: str) -> None:
    size = 400 if name == "folder" else None
    result = convert(ckpt, tmp_path / name, to="safetensors", max_shard_size=size)
    assert result.left_out == [
        "optimizer_states, lr_schedulers, loops, callbacks, hyper_parameters: only the model is written"
    ]
    convert(tmp_path / name, tmp_path / "again.ckpt")
    again = read(tmp_path / "again.ckpt")
    assert_same(again["state_dict"], trainer_checkpoint()["state_dict"])
    assert (again["epoch"], again["global_step"]) == (1, 3)
    assert tied(again["state_dict"], "embedding.weight", "head.weight")
    convert(tmp_path / name, tmp_path / "sharded", to="sharded")
    assert_same(load(tmp_path / "sharded")["state_dict"], trainer_checkpoint()["state_dict"])


def test_training_goes_on_from_what_was_converted(ckpt: Path, tmp_path: Path) -> None:
    """The optimizer loads as torch's own, and the next step is that of the run that was not interrupted."""
    convert(ckpt, tmp_path / "sharded", to="sharded")
    convert(tmp_path / "sharded", tmp_path / "again.ckpt")
    checkpoint = read(tmp_path / "again.ckpt")
    net = Net()
    optimizer = torch.optim.AdamW(net.groups())
    net.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    expected, its = trained()
    step(net, optimizer, 5)
    step(expected, its, 5)
    assert_same(net.state_dict(), expected.state_dict())


class Module(LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(width, width)


def test_lightning_loads_a_model_of_safetensors(tmp_path: Path) -> None:
    module = Module()
    torch.save(module.state_dict(), tmp_path / "weights.pt")  # no Trainer's: a model alone
    convert(tmp_path / "weights.pt", tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "model.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "model.ckpt")
    assert_same(loaded.state_dict(), module.state_dict())


def test_what_fabric_saves_keeps_its_shape(tmp_path: Path) -> None:
    net, optimizer = trained()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "iteration": 5, "note": "x"}
    torch.save(state, tmp_path / "fabric.ckpt")
    convert(tmp_path / "fabric.ckpt", tmp_path / "sharded", to="sharded")
    assert_same(load(tmp_path / "sharded"), state)
    convert(tmp_path / "sharded", tmp_path / "again.ckpt")
    assert_same(read(tmp_path / "again.ckpt"), state)
    convert(tmp_path / "sharded", tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert_same(file.get_tensor("second.weight"), state["model"]["second.weight"])


def test_a_prefix_selects_a_part_of_the_model(ckpt: Path, tmp_path: Path) -> None:
    result = convert(ckpt, tmp_path / "norm.safetensors", prefix="norm.")
    assert result.tensors == 2
    assert result.left_out[0] == "10 entries of the model whose names do not begin with 'norm.'"
    convert(ckpt, tmp_path / "norm.ckpt", prefix="norm.")
    found = read(tmp_path / "norm.ckpt")
    expected = trainer_checkpoint()["state_dict"]
    assert_same(found["state_dict"], {name: expected[f"norm.{name}"] for name in ("weight", "bias")})
    assert "optimizer_states" not in found
    with pytest.raises(ValueError, match=r"begin with prefix='model\.'"):
        convert(ckpt, tmp_path / "none.ckpt", prefix="model.")


def test_extra_state_of_modules_is_kept_or_reported(tmp_path: Path) -> None:
    state = {"weight": torch.ones(2), "layer._extra_state": {"scale": 3}}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0"}, tmp_path / "extra.ckpt")
    convert(tmp_path / "extra.ckpt", tmp_path / "sharded", to="sharded")
    assert_same(load(tmp_path / "sharded")["state_dict"], state)
    result = convert(tmp_path / "extra.ckpt", tmp_path / "extra.safetensors")
    assert result.left_out == ["layer._extra_state of the model: no tensors"]


def test_several_models_are_not_guessed_at(tmp_path: Path) -> None:
    torch.save({"generator": {"w": torch.ones(2)}, "discriminator": {"w": torch.ones(2)}}, tmp_path / "gan.ckpt")
    with pytest.raises(ValueError, match="to hold one model.*got.*discriminator.*generator"):
        convert(tmp_path / "gan.ckpt", tmp_path / "gan.safetensors")
    convert(tmp_path / "gan.ckpt", tmp_path / "gan", to="sharded")  # here both have a place
    assert set(load(tmp_path / "gan")) == {"generator", "discriminator"}


DTYPES = [
    *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int16, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool),
    *(torch.complex64, torch.complex128),
]


def test_every_dtype(tmp_path: Path) -> None:
    values = torch.randint(0, 2, (16, 3), dtype=torch.uint8)
    state = {str(dtype): values.to(torch.float32).to(dtype) for dtype in DTYPES}
    state |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.0), "transposed": torch.randn(3, 5).t()}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "sharded", to="sharded")
    convert(tmp_path / "sharded", tmp_path / "b.ckpt")
    assert_same(read(tmp_path / "b.ckpt")["state_dict"], state)

    with pytest.raises(ValueError, match=r"dtypes that safetensors has, got \{'torch.complex128'"):
        convert(tmp_path / "b.ckpt", tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()
    del state["torch.complex128"]
    torch.save(state, tmp_path / "d.pt")
    convert(tmp_path / "d.pt", tmp_path / "d.safetensors")
    convert(tmp_path / "d.safetensors", tmp_path / "e.ckpt")
    assert_same(read(tmp_path / "e.ckpt")["state_dict"], state)
