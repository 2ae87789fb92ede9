"""Live bytes by kind, moment by moment, as tensors come and go.

[Note: what is seen]
A dispatch mode sees every tensor that an operation returns, real or fake, and so each piece of memory when it comes; a
weak reference to it tells when it goes. Full shard frees and fills memory in place (``UntypedStorage.resize_``), which
is no operation: that method is watched as well. Not seen is what kernels take for themselves, and what other threads
do.

[Note: kinds]
The engine says what it takes memory for (core/memory.py). What a forward has made and is still there when backward
begins are activations; so is what recomputation makes within backward. All that nobody has a name for is temporary.
What a piece of memory is may be known later than it came: kinds are looked up when all is over.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self, override

from lightning_accel.core import memory
from lightning_accel.core.placeholder import ShardedGradient
from lightning_accel.planning.shortcuts import Shortcuts

Kind: TypeAlias = memory.Purpose | Literal["optimizer_state", "buffers", "activations", "temporary"]
KINDS: tuple[Kind, ...] = (
    "parameters",
    "master_parameters",
    "optimizer_state",
    "gradients",
    "buffers",
    "gathered",
    "activations",
    "temporary",
)
"""All of them; those that rest between steps come first."""
Phase: TypeAlias = Literal["rest", "forward", "backward", "step"]


class _Block:
    """One piece of memory."""

    __slots__ = ("born", "kind", "reference", "size")

    def __init__(self, size: int, born: Phase) -> None:
        self.size = size
        self.born = born
        self.kind: Kind | None = None
        self.reference: Any = None


@dataclass(frozen=True)
class Course:
    """Live bytes over some time."""

    moments: list[dict[Kind, int]]
    """Bytes by kind whenever something came or went."""
    phases: list[Phase]
    """When that was."""

    @property
    def peak(self) -> dict[Kind, int]:
        """Bytes by kind when there were most."""
        return max(self.moments, key=lambda moment: sum(moment.values()), default={})

    def peak_of(self, kinds: Iterable[Kind]) -> int:
        """Most bytes of some kinds together."""
        chosen = list(kinds)
        return max((sum(moment[kind] for kind in chosen) for moment in self.moments), default=0)


class Ledger(TorchDispatchMode):
    """Within it, knows what live memory is for. See [Note: what is seen]."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: Phase = "rest"
        self._blocks: dict[int, _Block] = {}
        self._events: list[tuple[_Block, int, Phase]] | None = None
        self._exits = ExitStack()
        self._shortcuts = Shortcuts()

    @override
    def __enter__(self) -> Self:
        self._exits.enter_context(memory.watched(lambda tensor, purpose: self.label([tensor], purpose)))
        resize = torch.UntypedStorage.resize_

        def watched(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            block = self._blocks.get(storage._cdata)
            if block is not None:
                self._change(block, size)

        self._exits.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", watched))
        return super().__enter__()

    @override
    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._exits.close()
        self._blocks.clear()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry an operation out and look at what it returns."""
        result = self._shortcuts.run(func, args, kwargs or {})
        self._look_at(result)
        return result

    def label(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Say what tensors are, whether they are known already or not."""
        for tensor in tensors:
            block = self._block_of(tensor)
            if block is not None:
                block.kind = kind

    def enter(self, phase: Phase) -> None:
        """Say what comes now."""
        if phase == "backward":
            for block in self._blocks.values():
                if block.born == "forward" and block.kind is None:
                    block.kind = "activations"
        self.phase = phase

    @contextmanager
    def recording(self) -> Iterator[list[Course]]:
        """Within it, every moment is noted. The list that it gives has the course as its only item afterwards."""
        before, phase = [(block, block.size) for block in self._blocks.values()], self.phase
        self._events = []
        found: list[Course] = []
        try:
            yield found
        finally:
            found.append(_course(before, phase, self._events))
            self._events = None

    @property
    def now(self) -> dict[Kind, int]:
        """Live bytes by kind."""
        live: Counter[Kind] = Counter(dict.fromkeys(KINDS, 0))
        for block in self._blocks.values():
            live[block.kind or "temporary"] += block.size
        return dict(live)

    def _look_at(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._block_of(value)
        elif isinstance(value, list | tuple):
            for one in value:
                self._look_at(one)

    def _block_of(self, tensor: Tensor) -> _Block | None:
        if isinstance(tensor, ShardedGradient) or tensor.layout is not torch.strided:
            return None  # one that has no memory; and what the engine refuses
        with torch._C.DisableTorchFunctionSubclass():
            storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(0, self.phase)
            if self.phase == "backward" and torch.is_grad_enabled():
                block.kind = "activations"  # of recomputation: kernels of backward have no graph
            block.reference = weakref.ref(storage, lambda _: self._forget(key))
        if block.size != size:
            self._change(block, size)
        return block

    def _forget(self, key: int) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self._change(block, 0)

    def _change(self, block: _Block, size: int) -> None:
        if self._events is not None:
            self._events.append((block, size - block.size, self.phase))
        block.size = size


def _course(before: Sequence[tuple[_Block, int]], began: Phase, events: Sequence[tuple[_Block, int, Phase]]) -> Course:
    live: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for block, size in before:
        live[block.kind or "temporary"] += size
    moments, phases = [dict(live)], [began]
    for block, change, phase in events:
        live[block.kind or "temporary"] += change
        moments.append(dict(live))
        phases.append(phase)
    return Course(moments, phases)
