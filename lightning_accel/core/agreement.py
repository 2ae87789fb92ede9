"""The ranks must have the same model, and rank 0's values are what all of them train."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_accel.core.collectives import Collectives, nbytes
from lightning_accel.core.connecting import connect

_BROADCAST_BYTES = 25 * 2**20
"""Small tensors travel together in messages of about this size."""


def describe(module: nn.Module) -> list[str]:
    """One line for each parameter and buffer: all that must be the same on every rank."""
    lines = [
        f"parameter {name!r}: shape {tuple(p.shape)}, {p.dtype}, {'trainable' if p.requires_grad else 'frozen'}"
        + ", without values" * p.is_meta
        for name, p in module.named_parameters(remove_duplicate=False)
    ]
    lines += [
        f"buffer {name!r}: shape {tuple(b.shape)}, {b.dtype}" + ", without values" * b.is_meta
        for name, b in module.named_buffers()
    ]
    return lines


def require_same(lines: Sequence[str], collectives: Collectives, what: str) -> None:
    """Raise on every rank if the ranks' descriptions differ.

    Args:
        lines: This rank's description.
        collectives: The ranks.
        what: What is described, for the message.

    Raises:
        ValueError: Names the first difference and the rank that differs from rank 0.

    """
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    digests = collectives.gather_objects(digest)
    if len(set(digests)) == 1:
        return
    everyone = collectives.gather_objects(list(lines))
    for rank, theirs in enumerate(everyone):
        for position in range(max(len(everyone[0]), len(theirs))):
            expected = everyone[0][position] if position < len(everyone[0]) else "nothing more"
            found = theirs[position] if position < len(theirs) else "nothing more"
            if expected != found:
                raise ValueError(
                    f"Expected the same {what} on every rank, but entry {position} differs: rank 0 has"
                    f" {expected}, rank {rank} has {found}. Build it from the same code and configuration on every"
                    " rank, in the same order."
                )
    raise AssertionError("digests differ, descriptions do not")


def require_shapes(module: nn.Module) -> None:
    """Raise if a parameter has no shape yet.

    Raises:
        ValueError: Names the parameters.

    """
    lazy = [name for name, p in module.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"Expected initialised parameters, but {', '.join(lazy)} are lazy and have no shape yet. Run one batch"
            " through the model before it is set up."
        )


class BufferVersions:
    """Tells which buffers of a module changed, such as BatchNorm's statistics.

    A buffer has changed if it was replaced or written to in a way that autograd counts. The kernels of torch's own
    normalisation layers write their statistics without being counted: in training, those are taken to have changed.

    Args:
        module: Its buffers are watched.

    """

    def __init__(self, module: nn.Module) -> None:
        # Not by ``_buffers``, which scripted modules do not have as a dict.
        self._held = [(owner, name) for owner in module.modules() for name, _ in owner.named_buffers(recurse=False)]
        self._seen: list[tuple[int, int]] = []
        self.refresh()

    def __len__(self) -> int:
        return len(self._held)

    def _current(self) -> list[tuple[int, int]]:
        buffers = (getattr(owner, name, None) for owner, name in self._held)
        return [(0, 0) if buffer is None else (id(buffer), _version(buffer)) for buffer in buffers]

    def changed(self) -> list[bool]:
        """For each buffer, whether it was written to or replaced since the last ``refresh``."""
        return [
            now != then or (isinstance(owner, _NormBase) and owner.training and owner.track_running_stats)
            for now, then, (owner, _) in zip(self._current(), self._seen, self._held, strict=True)
        ]

    def refresh(self) -> None:
        """Take the buffers as they are for unchanged."""
        self._seen = self._current()

    def select(self, flags: Sequence[bool]) -> list[Tensor]:
        """The buffers with a flag set."""
        found = (getattr(owner, name, None) for (owner, name), flag in zip(self._held, flags, strict=True) if flag)
        return [buffer for buffer in found if buffer is not None]


def synchronise(
    module: nn.Module, group: dist.ProcessGroup | None = None, device: torch.device | None = None
) -> Collectives:
    """Give every rank rank 0's parameters and buffers. All ranks take part.

    Args:
        module: The model. What is on the meta device stays there.
        group: The ranks.
        device: Where the model is to be, if no parameter tells.

    Returns:
        The collectives that suit the module's device.

    Raises:
        ValueError: If the ranks' models differ, or have parameters without a shape.

    """
    require_shapes(module)
    tensors = [*module.parameters(), *module.buffers()]
    there = next((tensor.device for tensor in tensors if not tensor.is_meta), device or torch.device("cpu"))
    collectives = connect(there, group)
    require_same(describe(module), collectives, "model")
    broadcast_tensors([tensor for tensor in tensors if not tensor.is_meta], collectives)
    return collectives


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor], collectives: Collectives) -> None:
    """Overwrite tensors with those of rank 0; small ones of one dtype travel together."""
    if collectives.ranks == 1:
        return
    batches: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        batch = batches.setdefault(tensor.dtype, [])
        if batch and sum(map(nbytes, batch)) + nbytes(tensor) > _BROADCAST_BYTES:
            _broadcast_together(batch, collectives)
            batch.clear()
        batch.append(tensor)
    for batch in batches.values():
        _broadcast_together(batch, collectives)


def _broadcast_together(tensors: Sequence[Tensor], collectives: Collectives) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    # bool has no arithmetic, but bytes travel all the same.
    collectives.broadcast(flat.view(torch.uint8) if flat.dtype is torch.bool else flat)
    offset = 0
    for tensor in tensors:
        tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version  # inference tensors are not counted
