"""Reads files of ``torch.save`` without running what they say.

[Note: nothing is executed]
A pickle is a program: it may call any function that can be imported. ``torch.load(weights_only=True)`` admits tensors
and containers of plain values only. DeepSpeed's files name a few classes of its own besides. Those which are known to
be plain records are read as ``Record``, which keeps their attributes and does nothing; deepspeed is never imported.
Whatever else a file asks for is looked for before anything is loaded, and refused by name.
"""

from __future__ import annotations

import os
import pickle
import types
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from typing_extensions import override


class Record:
    """Stands for an object of a class that is not imported. Its attributes are what was saved of it."""


RECORDS: dict[str, Any] = {
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape": Record,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Record,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Record,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.utils.tensor_fragment.fragment_address": Record,
}
"""DeepSpeed's classes that its checkpoints name, and what stands for them."""


class _Unpickler(pickle.Unpickler):
    """For files that the user trusts: imports what they name, but for DeepSpeed's records."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        """Look a class or a function up."""
        return RECORDS.get(f"{module}.{name}") or super().find_class(module, name)


_PICKLE = types.SimpleNamespace(Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load())
"""What torch.load uses of the module ``pickle``."""


def load_file(path: str | os.PathLike[str], *, weights_only: bool = True) -> Any:
    """Read a file of ``torch.save``. Its tensors are mapped: they are read when they are used.

    Args:
        path: Of a local file.
        weights_only: Refuse everything but tensors, numbers, strings, their collections and DeepSpeed's records.

    Returns:
        What was saved, its tensors on the CPU.

    Raises:
        ValueError: If the file holds something else, which it names, or cannot be read.
        FileNotFoundError: If there is none.

    """
    with safe_globals([(stand_in, name) for name, stand_in in RECORDS.items()]):
        mapped = _is_zip(path)
        try:
            if weights_only and mapped and (unsafe := get_unsafe_globals_in_checkpoint(path)):
                raise ValueError(_refusal(path, ", ".join(sorted(unsafe))))
            if weights_only:
                return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=False, pickle_module=_PICKLE)
        except pickle.UnpicklingError as error:
            if weights_only:
                raise ValueError(_refusal(path, f"something else ({str(error).splitlines()[0]})")) from error
            raise ValueError(_unreadable(path, error)) from error
        except (RuntimeError, EOFError, KeyError, IndexError, UnicodeDecodeError) as error:
            raise ValueError(_unreadable(path, error)) from error


def _is_zip(path: str | os.PathLike[str]) -> bool:
    """Whether torch can map the tensors: not those of files that torch before 1.6 has written."""
    with open(path, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _refusal(path: str | os.PathLike[str], what: str) -> str:
    return (
        f"Expected {os.fspath(path)} to hold tensors, numbers, strings and collections of them only, but it asks for"
        f" {what}. Nothing of it was run. If you trust where it comes from, read it with weights_only=False"
        " (--no-weights-only)."
    )


def _unreadable(path: str | os.PathLike[str], error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return f"Expected {os.fspath(path)} to be a file of torch.save, but it cannot be read: {lines[0]}"
