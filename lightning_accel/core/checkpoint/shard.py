"""This rank's part of a tensor that is to be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.utils._pytree import tree_leaves

from lightning_accel.core.checkpoint.boxes import Box, boxes_of_range, memory_order
from lightning_accel.core.checkpoint.stored import StoredTensor

CHUNK_BYTES = 2**24
"""About how many bytes are written, and later read, at once: it bounds the memory that this takes."""


Part = Tensor | Callable[[], Tensor]
"""The values of a box, or what reads them when their turn comes."""


class Shard(Tensor):
    """What a rank has of one tensor, for a checkpoint: boxes, and the memory where they are.

    It stands for the tensor in dictionaries that are to be saved, and describes itself to torch.distributed.checkpoint.
    It has the whole tensor's shape and dtype, but no values: nothing can be computed with it.

    Args:
        shape: Of the whole tensor.
        dtype: Of the whole tensor.
        parts: This rank's boxes, and views of the memory where their values are.
        frozen: Whether the values are not trained: their file may be shared with the previous checkpoint.

    """

    parts: dict[tuple[int, ...], tuple[Box, Part]]
    frozen: bool

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, parts: Iterable[tuple[Box, Tensor]], frozen: bool = False
    ) -> Shard:
        """Make one that holds the parts."""
        made = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype)
        made.parts = {}
        for box, values in parts:
            assert values.shape == box.sizes, f"{values.shape} is not {box}"
            for slab in box.slabs(max(1, CHUNK_BYTES // dtype.itemsize)):
                if isinstance(values, StoredTensor):
                    made.parts[slab.offsets] = slab, partial(_read, values, slab)
                else:
                    made.parts[slab.offsets] = slab, slab.of(values, box)
        made.frozen = frozen
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def whole(cls, tensor: Tensor, frozen: bool = False) -> Shard:
        """All of a tensor, which other ranks have as well: one of them writes it."""
        values = tensor if isinstance(tensor, StoredTensor) else tensor.detach()
        return cls(tensor.shape, tensor.dtype, [(Box.whole(tensor.shape), values)], frozen)

    @classmethod
    def of_range(
        cls, shape: Sequence[int], strides: Sequence[int], start: int, values: Tensor, frozen: bool = False
    ) -> Shard:
        """A range of the elements of a dense tensor.

        Args:
            shape: Of the tensor.
            strides: Of the tensor, which say in what order its elements lie.
            start: The first element of the range, in that order.
            values: 1-D: the range.
            frozen: See ``Shard``.

        """
        parts = ranged(shape, strides, start, values)
        return cls(shape, values.dtype, parts, frozen)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Shard(shape={tuple(self.shape)}, dtype={self.dtype}, boxes={[box for box, _ in self.parts.values()]})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        """Refuse: the values are on several ranks."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        found = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, Shard)]
        raise found[0]._has_no_values(str(func))

    def _has_no_values(self, wanted: str) -> RuntimeError:
        return RuntimeError(
            f"Expected tensors of a sharded checkpoint to be passed on, renamed or left out only, but {wanted} wants"
            f" the values of one (shape {tuple(self.shape)}), of which each rank has a part. Save with"
            " state_dict_type='full' (an option of the strategy) to change values while saving, or use"
            " engine.full_parameters()."
        )

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse: the values are on several ranks."""
        raise self._has_no_values("numpy()")

    def tolist(self) -> Any:
        """Refuse: the values are on several ranks."""
        raise self._has_no_values("tolist()")

    def untyped_storage(self) -> torch.UntypedStorage:
        """Refuse: there is no memory behind it."""
        raise self._has_no_values("untyped_storage()")

    def data_ptr(self) -> int:
        """Refuse: there is no memory behind it."""
        raise self._has_no_values("data_ptr()")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "Expected parts of tensors to be saved by the strategy that made them (trainer.save_checkpoint or"
            " fabric.save), not by torch.save or pickle. Use state_dict_type='full' for whole tensors."
        )

    # ------------------------------------------------- torch.distributed.checkpoint

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, box.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box), properties=TensorProperties(dtype=self.dtype), size=self.shape
                ),
            )
            for box, _ in self.parts.values()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box, _ in self.parts.values()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        values = self.parts[tuple(index.offset)][1]
        return values if isinstance(values, Tensor) else values()


def ranged(shape: Sequence[int], strides: Sequence[int], start: int, values: Tensor) -> list[tuple[Box, Tensor]]:
    """The boxes that a range of the elements of a dense tensor is, each with a view of its values.

    Args:
        shape: Of the tensor.
        strides: Of the tensor.
        start: The first element of the range, in memory order.
        values: 1-D: the range.

    """
    order = memory_order(shape, strides)
    back = tuple(order.index(dim) for dim in range(len(order)))
    found, done = [], 0
    for box in boxes_of_range([shape[dim] for dim in order], start, start + values.numel()):
        part = values[done : done + box.numel].view(box.sizes)
        found.append((box.permuted(back), part.permute(back)))
        done += box.numel
    return found


def _read(tensor: StoredTensor, box: Box) -> Tensor:
    values = torch.empty(box.sizes, dtype=tensor.dtype)
    tensor.fill([(box, values)])
    return values


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))
