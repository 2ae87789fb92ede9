"""From one format of checkpoints to another."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_accel.convert.contents import Contents, model_in, walk
from lightning_accel.convert.formats import CKPT_SUFFIXES, SAFETENSORS_SUFFIX, find_format
from lightning_accel.convert.lightning_ckpt import complete, save_ckpt
from lightning_accel.convert.output import check_destination
from lightning_accel.convert.safetensors_files import MAX_SHARD_SIZE, save_safetensors
from lightning_accel.convert.sharded import save_ours
from lightning_accel.convert.sizes import parse_size

Target = Literal["ckpt", "sharded", "safetensors"]


@dataclass
class Conversion:
    """What was done."""

    source: str
    """The format of what was read."""
    target: Target
    """The format of what was written."""
    path: Path
    """Where it is."""
    tensors: int
    """How many were written."""
    nbytes: int
    """Of these; those that are tied count under each name."""
    left_out: list[str] = field(default_factory=list)
    """What of the source is not in it, and why."""


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: Target | None = None,
    max_shard_size: int | str | None = None,
    prefix: str = "",
    weights_only: bool = True,
    overwrite: bool = False,
    begin: Callable[[int], None] = lambda total: None,
    done: Callable[[int], None] = lambda nbytes: None,
) -> Conversion:
    """Write a checkpoint in another format. Values stay what they are, bit by bit.

    Host memory holds one tensor at a time.

    Args:
        src: A checkpoint of any kind: a directory of this package, of Lightning's FSDPStrategy or
            ModelParallelStrategy or of ``torch.distributed.checkpoint``; a DeepSpeed directory, of ZeRO stages 0 to 3
            or universal; a ``.ckpt`` or another file of ``torch.save``; safetensors, as one file or as a folder.
        dst: Where to write. It is there as a whole, or not at all.
        to: ``"ckpt"``: one file, which stock Lightning loads. ``"sharded"``: a directory of this package.
            ``"safetensors"``: the model alone, as a file if ``dst`` ends in ``.safetensors``, else as a folder as
            Hugging Face has it. By default what the suffix of ``dst`` says.
        max_shard_size: Of a safetensors folder: bytes of a file at most, as a number or as ``"5GB"``, the default.
        prefix: Of a model in a LightningModule, such as ``"model."``: only what begins with it, without it, and nothing
            but the model.
        weights_only: Refuse sources that hold anything but tensors, numbers, strings and their collections.
            ``False`` runs what a source says: for those that you trust.
        overwrite: Replace a checkpoint that is at ``dst``.
        begin: Called with the bytes of all tensors before the first is written.
        done: Called with the bytes of each tensor.

    Returns:
        What was done, and what was left out.

    Raises:
        ValueError: If the source cannot be read, holds what is refused, or cannot be written in that format.
        FileNotFoundError: If there is no source.
        FileExistsError: If there is something at ``dst``.
        OSError: If it cannot be written.

    """
    source, final = Path(src), Path(dst)
    target = _target(final, to)
    limit = _limit(final, target, max_shard_size)
    kind, found = find_format(source)
    check_destination(source, final, overwrite=overwrite)
    contents = kind.open(found, weights_only=weights_only)
    left_out = list(contents.left_out)
    nest = _only(contents, prefix, source, left_out) if prefix else contents.nest
    if target == "safetensors":
        model = model_in(nest, str(source))
        tensors: dict[str, Tensor] = {name: entry for name, entry in model.items() if isinstance(entry, Tensor)}
        left_out += _beside(nest, model)
        nbytes = sum(entry.nbytes for entry in tensors.values())
        begin(nbytes)
        save_safetensors(final, tensors, nest, done, max_shard_size=limit)
        return Conversion(kind.name, target, final, len(tensors), nbytes, left_out)
    entries = [entry for _, entry in walk(nest) if isinstance(entry, Tensor)]
    nbytes = sum(entry.nbytes for entry in entries)
    begin(nbytes)
    if target == "ckpt":
        save_ckpt(final, nest, done)
    else:
        info = {"step": nest.get("global_step"), "epoch": nest.get("epoch"), "converted_from": contents.writer}
        save_ours(final, complete(nest), info, done)
    return Conversion(kind.name, target, final, len(entries), nbytes, left_out)


def _target(dst: Path, to: Target | None) -> Target:
    if to is None:
        if dst.suffix == SAFETENSORS_SUFFIX:
            return "safetensors"
        if dst.suffix in CKPT_SUFFIXES:
            return "ckpt"
        raise ValueError(
            f"Expected {dst} to end in {', '.join((*CKPT_SUFFIXES, SAFETENSORS_SUFFIX))}, or to be told what to write:"
            f" to= (--to) {', '.join(get_args(Target))}."
        )
    if to not in get_args(Target):
        raise ValueError(f"Expected to= (--to) {', '.join(get_args(Target))}, got {to!r}.")
    return to


def _limit(dst: Path, target: Target, max_shard_size: int | str | None) -> int | None:
    """Bytes of a file; None for a file that holds everything."""
    is_folder = target == "safetensors" and dst.suffix != SAFETENSORS_SUFFIX
    if is_folder:
        return parse_size(MAX_SHARD_SIZE if max_shard_size is None else max_shard_size)
    if max_shard_size is not None:
        raise ValueError(
            f"Expected max_shard_size (--max-shard-size) for a safetensors folder only, got it for {dst}. Leave it out,"
            f" or name a folder, whose name does not end in {SAFETENSORS_SUFFIX}, with to='safetensors'."
        )
    return None


def _only(contents: Contents, prefix: str, source: Path, left_out: list[str]) -> dict[str, Any]:
    """The part of the model whose names begin with ``prefix``."""
    model = model_in(contents.nest, str(source))
    own = {name.removeprefix(prefix): entry for name, entry in model.items() if name.startswith(prefix)}
    if not own:
        raise ValueError(
            f"Expected names in {source} that begin with prefix={prefix!r} (--prefix), got"
            f" {', '.join(map(repr, list(model)[:5]))}, …"
        )
    if len(own) < len(model):
        left_out.append(f"{len(model) - len(own)} entries of the model whose names do not begin with {prefix!r}")
    left_out += [message for message in _beside(contents.nest, model) if message not in left_out]
    kept: dict[str, Any] = {key: contents.nest[key] for key in ("epoch", "global_step") if key in contents.nest}
    return {**kept, "state_dict": own}


def _beside(nest: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """What there is but the tensors of the model."""
    extra = [name for name, entry in model.items() if not isinstance(entry, Tensor)]
    found = [f"{', '.join(extra)} of the model: no tensors"] if extra else []
    kept = ("epoch", "global_step", "pytorch-lightning_version")
    others = [str(key) for key, value in nest.items() if value is not model and key not in kept]
    if nest is not model and others:
        found.append(f"{', '.join(others)}: only the model is written")
    return found
