"""``torch.save``, but each tensor is read when its turn comes, and forgotten when it is written.

[Note: the format of torch.save]
A zip archive: ``data.pkl`` is the pickle of everything, in which a tensor is a call of ``_rebuild_tensor_v2`` (v3 for
newer dtypes) with a storage that is only named; ``data/0``, ``data/1``, … are the bytes of the storages. torch.save
collects all storages before it writes the first, so all tensors of a checkpoint would be in memory at once.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.serialization import get_crc32_options
from typing_extensions import override

from lightning_accel.core.checkpoint.stored import StoredTensor

_ALIGNMENT = 64
"""Of storages in the file, so that they can be mapped."""


def streamed_save(nest: Any, stream: IO[bytes], done: Callable[[int], None]) -> None:
    """Write what ``torch.load`` reads. Host memory holds one tensor at a time.

    Args:
        nest: Dictionaries, lists and what else can be pickled; tensors in it may be ``StoredTensor``. Those that share
            all their memory still do when they are loaded.
        stream: Where to.
        done: Called with the bytes of each tensor when it is written.

    Raises:
        ValueError: If a tensor is of a kind that has more than values: sparse, quantized, of a subclass.

    """
    content = io.BytesIO()
    pickler = _Pickler(content)
    pickler.dump(nest)
    guarded = _Guarded(stream)
    writer = torch.PyTorchFileWriter(cast(IO[bytes], guarded), get_crc32_options(), _ALIGNMENT)
    try:
        for name, record in (
            ("data.pkl", content.getvalue()),
            (".format_version", b"1"),
            (".storage_alignment", str(_ALIGNMENT).encode()),
            ("byteorder", sys.byteorder.encode()),
        ):
            writer.write_record(name, record, len(record))
        for key, tensor in enumerate(pickler.tensors):
            values = (tensor.full() if isinstance(tensor, StoredTensor) else tensor.detach()).cpu().contiguous()
            start = values.storage_offset() * values.element_size()
            storage = values.untyped_storage()[start : start + values.nbytes]
            writer.write_record(f"data/{key}", storage, values.nbytes)
            guarded.check()
            done(tensor.nbytes)
    finally:
        writer.write_end_of_file()  # or the writer would do it when nobody can catch what goes wrong
    guarded.check()


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that share all their memory, as tied parameters do."""
    if isinstance(tensor, StoredTensor) or not tensor.numel():
        return (id(tensor),)
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def can_be_streamed(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but its values."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter, StoredTensor)
    return plain and tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


class _Guarded:
    """A stream for torch's writer, which is no Python: errors must not pass through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._error: Exception | None = None

    def write(self, content: Any) -> int:
        size = memoryview(content).nbytes
        if self._error is None:
            try:
                self._stream.write(content)
            except Exception as error:
                self._error = error
        return size

    def flush(self) -> None:
        pass

    def check(self) -> None:
        """Raise what a write has failed with."""
        if self._error is not None:
            raise self._error


class _Storage:
    """Stands for the storage of a tensor."""

    def __init__(self, key: int, tensor: Tensor) -> None:
        names = torch.storage._dtype_to_storage_type_map()
        self.is_typed = tensor.dtype in names
        kind = getattr(torch, names[tensor.dtype]) if self.is_typed else torch.UntypedStorage
        self.id = ("storage", kind, str(key), "cpu", tensor.numel() if self.is_typed else tensor.nbytes)


class _Pickler(pickle.Pickler):
    """Has storages named. See [Note: the format of torch.save]."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, protocol=2)
        self.tensors: list[Tensor] = []
        """In the order of their storages."""
        self._storages: dict[tuple[Any, ...], _Storage] = {}

    @override
    def persistent_id(self, obj: Any) -> Any:
        """What names a storage."""
        return obj.id if isinstance(obj, _Storage) else None

    @override
    def reducer_override(self, obj: Any) -> Any:
        """How a tensor is made."""
        if not isinstance(obj, Tensor):
            return NotImplemented
        if not can_be_streamed(obj):
            raise ValueError(
                f"Expected plain tensors, got one of class {type(obj).__name__}, layout {obj.layout}, dtype {obj.dtype}"
                f" and shape {tuple(obj.shape)}. Save its dense values instead."
            )
        key = identity(obj)
        if key not in self._storages:
            self._storages[key] = _Storage(len(self.tensors), obj)
            self.tensors.append(obj)
        storage = self._storages[key]
        strides = torch.empty(obj.shape, device="meta").stride()
        arguments: tuple[Any, ...] = (storage, 0, tuple(obj.shape), strides, False, OrderedDict())
        if storage.is_typed:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, obj.dtype)
