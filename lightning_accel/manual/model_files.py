"""A model's weights as files: safetensors, divided as Hugging Face divides them, or what ``torch.save`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_accel.convert.contents import is_model
from lightning_accel.convert.output import new_file
from lightning_accel.convert.safetensors_files import save_safetensors
from lightning_accel.convert.sizes import parse_size
from lightning_accel.core.checkpoint import StoredTensor
from lightning_accel.core.unanimous import unanimous
from lightning_accel.manual.peers import Peers
from lightning_accel.strategies.engine_module import EngineModule

_STALE = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def save_model(
    module: EngineModule, folder: Path, max_shard_size: int | str, peers: Peers, *, safe_serialization: bool
) -> None:
    """Write a model's weights to a folder. All ranks take part.

    What rests sharded is sent to rank 0 one parameter at a time; rank 0 holds the model once in host memory, besides
    its own part.

    Args:
        module: The model with its engine.
        folder: Where ``model.safetensors`` (with an index if there are several files) or ``pytorch_model.bin`` goes.
            Other files in it stay.
        max_shard_size: Bytes of tensors in a file at most.
        peers: The ranks.
        safe_serialization: Safetensors; otherwise ``torch.save``.

    Raises:
        ValueError: If the state has something that the format has not.
        OSError: If it cannot be written; on every rank.

    """
    most = parse_size(max_shard_size)
    if folder.is_file():
        raise ValueError(f"Expected a folder to save a model in, got the file {folder}.")
    with module.engine.collected_parameters() as is_whole:

        def write() -> None:
            if peers.rank != 0:
                return
            assert is_whole
            _write(module.module.state_dict(), folder, most, safe_serialization)

        unanimous("saving a model", write, lambda value: peers.gather_objects(value, "save_model"))


def _write(state: dict[str, Any], folder: Path, most: int, safe_serialization: bool) -> None:
    if not safe_serialization:
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(folder / "pytorch_model.bin") as stream:
            torch.save(state, stream)
        _remove_stale(folder)  # readers take safetensors first
        return
    if not is_model(state):
        others = [name for name, value in state.items() if not isinstance(value, (Tensor, StoredTensor))]
        raise ValueError(
            f"Expected a model's state to consist of tensors for safetensors, but {', '.join(others) or 'it'} is not."
            " Use safe_serialization=False."
        )
    # Made beside the folder as a whole; then its files are moved in, the index last.
    made = folder.parent / f".{folder.name}.new"
    save_safetensors(made, state, {}, lambda _: None, max_shard_size=most)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    for file in sorted(made.iterdir(), key=lambda entry: entry.name.endswith(".json")):
        file.replace(folder / file.name)
    made.rmdir()


def _remove_stale(folder: Path) -> None:
    for pattern in _STALE:
        for old in folder.glob(pattern):
            old.unlink()


def save_object(value: Any, path: Path, *, safe_serialization: bool) -> None:
    """Write an object from one process. The file is complete, or what was there before is still there.

    Args:
        value: What ``torch.save`` takes; tensors by name for safetensors.
        path: Of the file.
        safe_serialization: Safetensors; otherwise ``torch.save``.

    Raises:
        ValueError: If safetensors has no such thing.

    """
    if not safe_serialization:
        with new_file(path) as stream:
            torch.save(value, stream)
        return
    if not is_model(value):
        raise ValueError(
            f"Expected a dictionary of tensors for safe_serialization=True, got {type(value).__name__}. Leave it out."
        )
    save_safetensors(path, value, {}, lambda _: None, max_shard_size=None)
