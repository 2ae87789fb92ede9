"""A range of a flat buffer that an optimizer updates as one tensor."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.core.layout import Piece
from lightning_accel.core.offload import host_memory, is_on_host
from lightning_accel.core.unit import Unit


class Segment:
    """Adjacent pieces of one unit and parameter group on this rank.

    Args:
        unit: Where the pieces lie.
        pieces: Adjacent pieces, in buffer order.
        group: Index of the parameter group.
        whole: Give the tensor the parameter's shape: for optimizers that need whole tensors. One piece only.
        on_host: Have the optimizer update a copy on the host, which is there while it steps only.

    """

    def __init__(
        self, unit: Unit, pieces: Sequence[Piece], group: int, *, whole: bool = False, on_host: bool = False
    ) -> None:
        self.unit = unit
        self.pieces = list(pieces)
        self.group = group
        self.whole = whole
        self.start = self.pieces[0].start
        self.stop = self.pieces[-1].stop
        self.on_host = on_host
        self._values = unit.memory.own(self.start, self.stop)
        if whole:
            assert len(self.pieces) == 1
            position = self.pieces[0].slot
            self._values = self._values.as_strided(unit.parameters[position].shape, unit.memory.strides[position])
        self.tensor = torch.empty(0, dtype=self._values.dtype) if self._is_copied else self._values
        """What the optimizer updates, and what its state is keyed by."""

    @property
    def _is_copied(self) -> bool:
        return self.on_host and not is_on_host(self._values)

    @property
    def copies_gradient(self) -> bool:
        """Whether the optimizer steps with a copy of the gradient."""
        return self._casts_gradient or (self.on_host and not is_on_host(self.unit.flat))

    @property
    def _casts_gradient(self) -> bool:
        return self.unit.rest_dtype != self._values.dtype

    def bring(self) -> None:
        """Have the values and the reduced gradient where the optimizer updates them."""
        gradient = self.unit.local_gradient(self.start, self.stop)
        if self.whole:
            gradient = gradient.as_strided(self._values.shape, self._values.stride())
        if self._is_copied:
            self.tensor.data = _to_host(self._values)
        if self._casts_gradient:
            gradient = gradient.to(self._values.dtype)
        self.tensor.grad = _to_host(gradient) if self.on_host and not is_on_host(gradient) else gradient

    def put_back(self) -> None:
        """Have updated values where they rest."""
        self.tensor.grad = None
        if self._is_copied:
            self._values.copy_(self.tensor)
            self.tensor.data = self.tensor.new_empty(0)

    def release(self) -> None:
        """Leave the unit's memory alone from now on."""
        self.tensor.data = self.tensor.new_empty(0)
        self._values = self.tensor

    @staticmethod
    def ranges(labelled: Sequence[tuple[Hashable, Piece]]) -> list[tuple[int, int]]:
        """The longest ranges of adjacent pieces with equal labels."""
        return [(run[0].start, run[-1].stop) for _, run in _runs(labelled)]

    @classmethod
    def runs(cls, unit: Unit, labelled: Sequence[tuple[int, Piece]], *, on_host: bool = False) -> list[Segment]:
        """The longest possible segments of pieces that are labelled with their group."""
        return [cls(unit, run, group, on_host=on_host) for group, run in _runs(labelled)]

    def split(self, labels: Sequence[Hashable], state: MutableMapping[Tensor, Any]) -> list[Segment]:
        """Cut between pieces with different labels, and the optimizer's state with them.

        Args:
            labels: One for each piece.
            state: The optimizer's state by tensor, changed in place. Values with an element per element of the segment
                are cut; others (step counts) are copied to each part.

        """
        runs = _runs(list(zip(labels, self.pieces, strict=True)))
        if len(runs) <= 1:
            return [self]
        parts = [Segment(self.unit, run, self.group, on_host=self.on_host) for _, run in runs]
        if self.tensor in state:
            whole = state.pop(self.tensor)
            for part in parts:
                where = slice(part.start - self.start, part.stop - self.start)
                state[part.tensor] = {
                    key: value[where].clone() if self.is_elementwise(value) else _copy(value)
                    for key, value in whole.items()
                }
        return parts

    def require_divisible(self, key: str, value: Any) -> None:
        """Raise unless a value of the optimizer's state can be told apart by parameters.

        Raises:
            ValueError: If it has another shape than the segment.

        """
        if isinstance(value, Tensor) and value.dim() > 0 and not self.whole and not self.is_elementwise(value):
            raise ValueError(
                f"Expected optimizer state {key!r} to have one element per parameter element, got shape"
                f" {tuple(value.shape)} for {self.stop - self.start} elements. The optimizer is registered as"
                " elementwise but is not."
            )

    def is_elementwise(self, value: Any) -> bool:
        """Whether a value of the optimizer's state has one element for each of the segment's."""
        return isinstance(value, Tensor) and value.shape == (self.stop - self.start,)


def _runs(labelled: Sequence[tuple[Any, Piece]]) -> list[tuple[Any, list[Piece]]]:
    runs: list[tuple[Any, list[Piece]]] = []
    for label, piece in labelled:
        if runs and runs[-1][0] == label and runs[-1][1][-1].stop == piece.start:
            runs[-1][1].append(piece)
        else:
            runs.append((label, [piece]))
    return runs


def _to_host(tensor: Tensor) -> Tensor:
    copy = host_memory(tensor.numel(), tensor.dtype)
    return copy.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
