"""Model state that is kept away from the device: in host memory, or in files.

[Note: where a step runs]
Offloaded state is updated where it lies, on the host's cores: a step moves gradients to the host instead of the state
to the device. (Ren et al., "ZeRO-Offload: Democratizing Billion-Scale Model Training", 2021.) Segments are moved and
updated one after the other, so that no more than one of them needs room on the host. Values are read from the device
before each step and written back after it: whatever else changed them in between is not lost.

[Note: state in files]
A file's pages are in memory while they are used; the system writes them out and drops them when memory is needed.
(Rajbhandari et al., "ZeRO-Infinity", 2021, do so by hand.) The file is unlinked as soon as it is mapped: however the
process ends, nothing is left behind.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_accel.core.placement import Rest, Row

OffloadKind: TypeAlias = Literal["optimizer", "parameters"]

_SMALL = 4096
"""Bytes below which a value of the state stays in memory: a file takes whole pages."""


def require_offload(kind: OffloadKind | None, row: Row) -> None:
    """Raise if a row cannot offload so.

    Raises:
        ValueError: If there is no such kind, or the row cannot do it.

    """
    if kind not in (None, "optimizer", "parameters"):
        raise ValueError(f"Expected offload to be 'optimizer', 'parameters' or None, got {kind!r}.")
    if kind == "parameters" and row.parameters is not Rest.SHARDED:
        raise ValueError(
            f"Expected a row whose parameters rest sharded for offload='parameters', got {row.name!r}: its own"
            " are on the device at all times. Use accel_fsdp, or offload='optimizer'."
        )


@dataclass(frozen=True)
class Offload:
    """What is kept away from the device, and where."""

    optimizer: bool = False
    """Optimizer state, in host memory or in files. The step runs on the CPU."""
    parameters: bool = False
    """This rank's part of the parameters, in host memory."""
    folder: Path | None = None
    """Where the files for optimizer state are made; none if not given."""

    @staticmethod
    def of(kind: OffloadKind | None, folder: str | os.PathLike[str] | None, row: Row) -> Offload:
        """The meaning of a user's settings.

        Args:
            kind: ``"optimizer"``, ``"parameters"`` (which includes the former) or None.
            folder: For files; made if it does not exist. If given alone, ``kind`` is ``"optimizer"``.
            row: The placement row.

        Raises:
            ValueError: If there is no such kind, the row cannot do it, or the folder cannot be written to.

        """
        require_offload(kind, row)
        path = None if folder is None else Path(folder)
        if path is not None:
            try:
                path.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=path).close()
            except OSError as error:
                raise ValueError(f"Expected offload_dir to be a folder that can be written to: {error}.") from error
        return Offload(kind is not None or path is not None, kind == "parameters", path)

    def keep(self, value: Tensor) -> Tensor:
        """A value of the optimizer's state where it is to be kept.

        Raises:
            OSError: If there is no room for it.

        """
        size = value.numel() * value.element_size()
        if self.folder is None or size < _SMALL or value.untyped_storage().filename is not None:
            return value
        handle, name = tempfile.mkstemp(prefix="lightning-accel-", dir=self.folder)
        try:
            # All of it at once: on a full disk a mapped write would end the process.
            os.posix_fallocate(handle, 0, size)
            mapped = torch.from_file(name, shared=True, size=value.numel(), dtype=value.dtype)
        finally:
            os.close(handle)
            os.unlink(name)
        return mapped.as_strided(value.shape, value.stride()).copy_(value)


def is_in_file(tensor: Tensor) -> bool:
    """Whether a tensor's memory is a file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def host_memory(numel: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised host memory that a device can copy from and to without the CPU's help."""
    return torch.empty(numel, dtype=dtype, pin_memory=torch.accelerator.is_available())


def is_on_host(tensor: Tensor) -> bool:
    """Whether the CPU can update a tensor in place."""
    return tensor.device.type == "cpu"
