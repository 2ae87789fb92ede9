"""A tensor that is in a checkpoint and is read when it is needed.

[Note: lazy tensors]
What a sharded checkpoint holds may be larger than one host's memory, while users' hooks (``on_load_checkpoint``) expect
a dictionary of tensors that they may rename, leave out, slice or replace. So each tensor of it reads itself whenever an
operation wants its values, and is forgotten again after it; whoever needs a part only (as engines do) reads that part.
An operation that changes it in place, or returns a view of it, has it kept from then on: changes must not be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_accel.core.checkpoint.boxes import Box

_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Keeper(Protocol):
    """Where tensors are: a ``Reader``, say."""

    def boxes(self, key: str) -> list[Box]:
        """The boxes that a tensor is stored as."""

    def fill(self, key: str, targets: Sequence[tuple[Box, Tensor]]) -> None:
        """Read parts of a tensor; see ``StoredTensor.fill``."""


class _Source:
    """Where a tensor is, or its values once they must be kept."""

    def __init__(self, reader: Keeper, key: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.reader = reader
        self.key = key
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.values: Tensor | None = None

    def full(self) -> Tensor:
        if self.values is not None:
            return self.values
        values = torch.empty(self.shape, dtype=self.dtype)
        self.reader.fill(self.key, [(Box.whole(self.shape), values)])
        return values


class StoredTensor(Tensor):
    """A tensor of a checkpoint, on the CPU. See [Note: lazy tensors].

    Args:
        reader: Of the checkpoint.
        key: The tensor's name in it.
        shape: The tensor's.
        dtype: The tensor's.

    """

    _source: _Source

    @staticmethod
    def __new__(cls, reader: Keeper, key: str, shape: Sequence[int], dtype: torch.dtype) -> StoredTensor:
        """Make one that reads from the files."""
        return cls._of(_Source(reader, key, shape, dtype))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def _of(cls, source: _Source) -> StoredTensor:
        made = Tensor._make_wrapper_subclass(cls, source.shape, dtype=source.dtype)
        made._source = source
        return made

    @property
    def key(self) -> str:
        """Its name in the checkpoint's files."""
        return self._source.key

    @property
    def boxes(self) -> list[Box]:
        """The boxes that lie together in files."""
        return self._source.reader.boxes(self._source.key)

    def full(self) -> Tensor:
        """All of it, as an ordinary tensor.

        Raises:
            ValueError: If a file is damaged.

        """
        return self._source.full()

    def fill(self, targets: Sequence[tuple[Box, Tensor]]) -> None:
        """Read parts of it; no byte twice, and none of a chunk that has nothing of them.

        Args:
            targets: Boxes, and tensors of their shapes to write their values to; converted to these tensors' dtypes.

        Raises:
            ValueError: If a file is damaged.

        """
        if self._source.values is not None:
            for box, target in targets:
                target.copy_(box.of(self._source.values))
        else:
            self._source.reader.fill(self._source.key, targets)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StoredTensor({self.key!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        """Read what is needed, and do the operation with that."""
        if func in _ALIASES and isinstance(args[0], StoredTensor):
            return cls._of(args[0]._source)
        if torch.Tag.inplace_view in func.tags:  # the values' shape would no longer be this one's
            raise RuntimeError(
                f"Expected the shape of a checkpoint's tensor to stay, but {func} changes it in place. Use what returns"
                " another tensor instead (unsqueeze, not unsqueeze_)."
            )
        schema = func._schema
        keeps = schema.is_mutable or any(value.alias_info is not None for value in schema.returns)

        def read(value: Any) -> Any:
            if not isinstance(value, StoredTensor):
                return value
            values = value._source.full()
            if keeps:
                value._source.values = values
            return values

        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))

    def numpy(self, *, force: bool = False) -> Any:
        """As ``Tensor.numpy``."""
        return self.full().numpy(force=force)

    def tolist(self) -> Any:
        """As ``Tensor.tolist``."""
        return self.full().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """As ``Tensor.untyped_storage``: it is read and kept."""
        self._source.values = self.full()
        return self._source.values.untyped_storage()

    def data_ptr(self) -> int:
        """As ``Tensor.data_ptr``: it is read and kept."""
        self._source.values = self.full()
        return self._source.values.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.full().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.full().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def fill_from(source: Tensor, targets: Sequence[tuple[Box, Tensor]]) -> None:
    """Write parts of a tensor, which may be one of a checkpoint, to other tensors.

    Args:
        source: The tensor.
        targets: Its boxes, and tensors of their shapes.

    """
    if isinstance(source, StoredTensor):
        source.fill(targets)
        return
    for box, target in targets:
        target.copy_(box.of(source.detach()))
