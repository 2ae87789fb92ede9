"""safetensors: a model's tensors in one file, or in several with Hugging Face's index.

[Note: the format of safetensors]
8 bytes with the header's length, the header (JSON: of each tensor dtype, shape and place; ``__metadata__``: strings by
name), the tensors' bytes end to end. So the header can be written first and the tensors one by one; the library's own
``save_file`` wants all of them in memory. Tensors of large elements come first, so that all are aligned.

No two tensors may share memory. Of tied ones the first is written, and the metadata say ``{other name: first name}``,
as the library's ``save_model`` does it. Reading ties them again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_accel.convert.contents import Contents
from lightning_accel.convert.output import new_file, new_folder
from lightning_accel.core.checkpoint import StoredTensor
from lightning_accel.core.checkpoint.streamed_save import identity

FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"
"""huggingface_hub's."""

_DTYPES = {
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}
"""What the format has, and how it names it."""

_WRITER, _STEP, _EPOCH = "writer", "global_step", "epoch"
"""Of our metadata."""


def is_safetensors_folder(path: Path) -> bool:
    """Whether it is a folder with a model in safetensors."""
    return path.is_dir() and any((path / name).is_file() for name in (FILE, INDEX_FILE))


# ------------------------------------------------------------------------ reading


def open_safetensors(path: Path, *, weights_only: bool = True) -> Contents:
    """Open a model. Its tensors are mapped: they are read when they are used.

    Args:
        path: Of a file, or of a folder with an index or with one file.
        weights_only: Has no meaning here: there are tensors and strings only.

    Raises:
        ValueError: If something is missing or damaged.

    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file, names in _files(path).items():
        try:
            with safe_open(file, framework="pt") as opened:
                metadata |= opened.metadata() or {}
                found = list(opened.keys())
                if missing := sorted(set(names) - set(found)):
                    raise ValueError(f"Expected {file} to hold the tensors {missing}, as the index says; it does not.")
                tensors |= {name: opened.get_tensor(name) for name in names or found}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"Expected {file} to be a safetensors file, but it cannot be read: {error}") from error
    for name, kept in metadata.items():
        if kept in tensors and name not in tensors:
            tensors[name] = tensors[kept]
    nest: dict[str, Any] = {"state_dict": tensors}
    for key in (_EPOCH, _STEP):
        if metadata.get(key, "").isdigit():
            nest[key] = int(metadata[key])
    return Contents(nest, metadata.get(_WRITER) or "safetensors")


def _files(path: Path) -> dict[Path, list[str]]:
    """The files of a model, and which tensors are to be in each; without an index none, that is whatever there is."""
    if path.is_file():
        return {path: []}
    index = path / INDEX_FILE
    if not index.is_file():
        return {path / FILE: []}
    files: dict[Path, list[str]] = {}
    try:
        for name, file in json.loads(index.read_text())["weight_map"].items():
            if Path(file).name != file:
                raise ValueError(f"{file!r} is not the name of a file beside it")
            if not (path / file).is_file():
                raise ValueError(f"there is no file {file!r}")
            files.setdefault(path / file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Expected {index} to say in which file each tensor is, but: {error}.") from error
    return files


# ------------------------------------------------------------------------ writing


def save_safetensors(
    path: Path,
    model: Mapping[str, Tensor],
    nest: Mapping[str, Any],
    done: Callable[[int], None],
    *,
    max_shard_size: int | None,
) -> None:
    """Write a model, tensor by tensor.

    Args:
        path: Of one file, or of a folder.
        model: The tensors by name.
        nest: The checkpoint it is from: step and epoch are noted.
        done: Called with the bytes of each tensor that is written.
        max_shard_size: Bytes of tensors in a file at most, but for a tensor that is larger; None: a file, not a folder.

    Raises:
        ValueError: If a tensor has a dtype that the format does not have.
        OSError: If it cannot be written.

    """
    if unknown := {name: entry.dtype for name, entry in model.items() if entry.dtype not in _DTYPES}:
        raise ValueError(
            f"Expected dtypes that safetensors has, got {unknown}. Convert to 'ckpt' or 'sharded', or save these as"
            " other tensors (complex ones as torch.view_as_real makes them)."
        )
    if "" in model or "__metadata__" in model:
        raise ValueError("Expected tensors of other names than '' and '__metadata__', which safetensors has not.")
    kept: dict[tuple[Any, ...], str] = {}
    tied = {name: first for name, entry in model.items() if (first := kept.setdefault(identity(entry), name)) != name}
    tensors = {name: model[name] for name in kept.values()}
    metadata = {"format": "pt", **_noted(nest)}
    if max_shard_size is None:
        with new_file(path) as stream:
            _write(stream, tensors, {**metadata, **tied}, done)
        return
    shards = divide({name: entry.nbytes for name, entry in tensors.items()}, max_shard_size)
    with new_folder(path) as folder:
        for index, names in enumerate(shards):
            own = {name: first for name, first in tied.items() if first in names}
            with folder.create(_shard_file(index, len(shards))) as stream:
                _write(stream, {name: tensors[name] for name in names}, {**metadata, **own}, done)
        if len(shards) > 1:
            weight_map = {name: _shard_file(index, len(shards)) for index, names in enumerate(shards) for name in names}
            total = sum(entry.nbytes for entry in tensors.values())
            body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            folder.write(INDEX_FILE, (json.dumps(body, indent=2) + "\n").encode())


def divide(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names of tensors file by file, in their order, as huggingface_hub divides them.

    Args:
        sizes: Bytes by name.
        most: Bytes of a file; a tensor that is larger has one of its own.

    """
    shards: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, nbytes in sizes.items():
        if nbytes > most:
            shards.append([name])
            continue
        if size + nbytes > most:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        size += nbytes
    return [*shards, current] if current or not shards else shards


def _shard_file(index: int, count: int) -> str:
    return FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _noted(nest: Mapping[str, Any]) -> dict[str, str]:
    from lightning_accel import __version__

    noted = {key: str(nest[key]) for key in (_EPOCH, _STEP) if isinstance(nest.get(key), int)}
    return {_WRITER: f"lightning-accel {__version__}", **noted}


def _write(
    stream: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], done: Callable[[int], None]
) -> None:
    """See [Note: the format of safetensors]."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    body = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    stream.write(len(body).to_bytes(8, "little"))
    stream.write(body)
    for name in names:
        tensor = tensors[name]
        values = tensor.full() if isinstance(tensor, StoredTensor) else tensor.detach()
        if values.numel():
            stream.write(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        done(tensor.nbytes)
