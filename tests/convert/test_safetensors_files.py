"""Models in safetensors, as the library and Hugging Face have them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Net, assert_same, trained
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor

from lightning_accel.convert import convert
from lightning_accel.convert.safetensors_files import divide, open_safetensors, save_safetensors


def write(path: Path, model: Mapping[str, Tensor], nest: dict[str, Any] | None = None, most: int | None = None) -> None:
    save_safetensors(path, model, nest or {}, lambda nbytes: None, max_shard_size=most)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    net, _ = trained()
    write(tmp_path / "model.safetensors", net.state_dict(), {"epoch": 1, "global_step": 3})
    other = Net()
    missing, unexpected = load_model(other, tmp_path / "model.safetensors")
    assert (list(missing), list(unexpected)) == ([], [])
    assert_same(other.state_dict(), net.state_dict())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert "head.weight" not in file.keys()  # noqa: SIM118 it is no dictionary
    assert metadata.pop("writer").startswith("lightning-accel ")
    assert metadata == {"format": "pt", "epoch": "1", "global_step": "3", "head.weight": "embedding.weight"}


def test_tensors_are_aligned(tmp_path: Path) -> None:
    state = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(5), "c": torch.ones(1, dtype=torch.float64)}
    write(tmp_path / "model.safetensors", state)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, tensor in state.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_a_folder_has_hugging_faces_index(tmp_path: Path) -> None:
    model = {f"layer.{index}": torch.randn(25, index + 1) for index in range(6)}
    write(tmp_path / "folder", model, most=700)
    split = split_torch_state_dict_into_shards(model, max_shard_size=700, filename_pattern="model{suffix}.safetensors")
    index = json.loads((tmp_path / "folder" / "model.safetensors.index.json").read_text())
    assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    for file, names in split.filename_to_tensors.items():
        assert_same(load_file(tmp_path / "folder" / file), {name: model[name] for name in names})
    assert_same(open_safetensors(tmp_path / "folder").nest["state_dict"], model)


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 20))
def test_shards_are_hugging_faces(sizes: list[int], most: int) -> None:
    model = {str(index): torch.empty(size, dtype=torch.uint8) for index, size in enumerate(sizes)}
    split = split_torch_state_dict_into_shards(model, max_shard_size=most) if model else None
    found = list(divide({name: entry.nbytes for name, entry in model.items()}, most))
    # theirs may begin with an empty file, if the first tensor is larger than any file
    assert [shard for shard in found if shard] == [] if split is None else [*split.filename_to_tensors.values()]


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    write(tmp_path / "folder", {"a": torch.ones(3)}, most=12)
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["model.safetensors"]


def test_a_model_without_tensors(tmp_path: Path) -> None:
    write(tmp_path / "folder", {}, most=12)
    assert open_safetensors(tmp_path / "folder").nest["state_dict"] == {}


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_loads_the_folder(tmp_path: Path, tie: bool) -> None:
    """What a LightningModule has in `self.model`, written in several files."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=17, n_positions=6, tie_word_embeddings=tie, initializer_range=1.0
    )
    model = GPT2LMHeadModel(config)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, "metric": torch.ones(1)}}, tmp_path / "last.ckpt")
    convert(tmp_path / "last.ckpt", tmp_path / "hf", to="safetensors", prefix="model.", max_shard_size="2KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    config.save_pretrained(tmp_path / "hf")
    loaded, report = GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(loaded.state_dict(), dict(model.state_dict()))

    loaded.save_pretrained(tmp_path / "theirs")  # and what transformers writes is read
    convert(tmp_path / "theirs", tmp_path / "theirs.ckpt")
    found = torch.load(tmp_path / "theirs.ckpt", weights_only=True)["state_dict"]
    if tie:  # their metadata do not say so
        found["lm_head.weight"] = found["transformer.wte.weight"]
    assert_same(found, dict(model.state_dict()))


def break_header(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtypo"'))


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-4])


def lose(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def edit_index(folder: Path, **names: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= names
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_header, "to be a safetensors file, but it cannot be read"),
        (truncate, "to be a safetensors file, but it cannot be read"),
        (lose, "there is no file 'model-00001-of-00002.safetensors'"),
        (lambda folder: edit_index(folder, a="../other.safetensors"), "is not the name of a file beside it"),
        (lambda folder: edit_index(folder, new="model-00002-of-00002.safetensors"), r"hold the tensors \['new'\]"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "in which file each tensor is"),
    ],
)
def test_bad_input_is_explained(tmp_path: Path, damage: Any, message: str) -> None:
    write(tmp_path / "folder", {"a": torch.ones(3), "b": torch.ones(3)}, most=12)
    damage(tmp_path / "folder")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "folder", tmp_path / "out.ckpt")


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    shutil.move(tmp_path / "model.safetensors", tmp_path / "weights")
    convert(tmp_path / "weights", tmp_path / "a.ckpt")
    assert_same(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"], {"a": torch.ones(3)})


def test_names_that_the_format_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of other names"):
        write(tmp_path / "a.safetensors", {"__metadata__": torch.ones(3)})
