"""The formats that are read and written, and how they are told from one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lightning_accel.convert.contents import Contents
from lightning_accel.convert.deepspeed import open_deepspeed
from lightning_accel.convert.deepspeed_files import find_deepspeed
from lightning_accel.convert.lightning_ckpt import open_ckpt
from lightning_accel.convert.safetensors_files import is_safetensors_folder, open_safetensors
from lightning_accel.convert.sharded import is_others, is_ours, open_others, open_ours

CKPT_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
SAFETENSORS_SUFFIX = ".safetensors"


class Opener(Protocol):
    """Opens a checkpoint."""

    def __call__(self, path: Path, /, *, weights_only: bool = True) -> Contents:
        """Open it; raises ValueError if it is damaged, or holds what is refused."""


@dataclass(frozen=True)
class Format:
    """A kind of checkpoints that can be read."""

    name: str
    """For people."""
    find: Callable[[Path], Path | None]
    """Where it is, if something at a path is of this kind: there, or below."""
    open: Opener


def _there(holds: Callable[[Path], bool]) -> Callable[[Path], Path | None]:
    return lambda path: path if holds(path) else None


FORMATS = (
    Format("sharded (lightning-accel)", _there(is_ours), open_ours),
    Format("sharded (torch.distributed.checkpoint)", _there(is_others), open_others),
    Format("DeepSpeed", find_deepspeed, open_deepspeed),
    Format("safetensors folder", _there(is_safetensors_folder), open_safetensors),
    Format("safetensors file", _there(lambda path: path.is_file() and _is_safetensors(path)), open_safetensors),
    Format("file of torch.save", _there(Path.is_file), open_ckpt),
)
"""In this order: what is found first counts."""


def _is_safetensors(path: Path) -> bool:
    """By the name, or by the content: a header of JSON after its length."""
    with path.open("rb") as stream:
        return path.suffix == SAFETENSORS_SUFFIX or stream.read(9)[8:] == b"{"


def find_format(path: Path) -> tuple[Format, Path]:
    """What is at a path.

    Returns:
        The format, and where the checkpoint is: it may be a folder below.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If there is something else.

    """
    if not path.exists():
        raise FileNotFoundError(f"Expected a checkpoint at {path}, found nothing.")
    for kind in FORMATS:
        if (found := kind.find(path)) is not None:
            return kind, found
    entries = sorted(entry.name for entry in path.iterdir())
    raise ValueError(
        f"Expected {path} to be a checkpoint: a directory of lightning_accel or torch.distributed.checkpoint (with a"
        " file .metadata), one of DeepSpeed (with a file latest, or *_model_states.pt), a folder with model.safetensors"
        f" or its index, or a file. It is a folder with {', '.join(entries[:10]) or 'nothing'} in it."
    )
