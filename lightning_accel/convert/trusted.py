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
import re
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


_PICKLE: Any = types.ModuleType("pickle")
"""What torch.load uses of that module."""
_PICKLE.Unpickler = _Unpickler
_PICKLE.load = lambda file, **options: _Unpickler(file, **options).load()


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
    mapped = _is_zip(path)
    try:
        if not weights_only:
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=False, pickle_module=_PICKLE)
        with safe_globals([(stand_in, name) for name, stand_in in RECORDS.items()]):
            unsafe = get_unsafe_globals_in_checkpoint(path) if mapped else []
            if not unsafe:
                return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        if (named := re.search(r"GLOBAL ([\w.]+\w)", str(error))) is None:
            raise _unreadable(path, error) from error
        unsafe = [named[1]]
    except Exception as error:  # any error at all can come of bytes that are damaged
        raise _unreadable(path, error) from error
    raise ValueError(
        f"Expected {os.fspath(path)} to hold tensors, numbers, strings and collections of them only, but it asks for"
        f" {', '.join(sorted(unsafe))}. Nothing of it was run. If you trust where it comes from, read it with"
        " weights_only=False (--no-weights-only)."
    )


def _is_zip(path: str | os.PathLike[str]) -> bool:
    """Whether torch can map the tensors: not those of files that torch before 1.6 has written."""
    with open(path, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    # torch's messages about pickles are advice for those who call torch.load.
    own = isinstance(error, pickle.UnpicklingError) or not str(error)
    why = "it is no pickle of tensors" if own else str(error).splitlines()[0]
    return ValueError(f"Expected {os.fspath(path)} to be a file of torch.save, but it cannot be read: {why}.")
