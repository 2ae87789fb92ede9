"""Checkpoint files as a strategy reads and writes them: on all ranks or on none.

[Note: what stays in a file]
What the model and its optimizers are loaded from is the bulk of a checkpoint, and they copy what they need of it. It
stays in the mapped file (see plugins/checkpoint_io.py). All else is copied: nobody knows who keeps it, and the file may
be on another machine, which may remove it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from torch import Tensor, nn

from lightning_accel.core.checkpoint import StoredTensor
from lightning_accel.plugins.checkpoint_io import AccelCheckpointIO, base_of
from lightning_accel.plugins.precision import engine_optimizer
from lightning_accel.strategies.compact import with_tensors
from lightning_accel.strategies.unanimous import unanimous

LEFT_IN_FILE = ("state_dict", "optimizer_states", "current_model_state")
"""Entries of a Trainer's checkpoint. See [Note: what stays in a file]."""


def require_intact(io: CheckpointIO, path: Any, *, is_first: bool) -> None:
    """Raise on every rank unless a checkpoint file is there on all of them, and as it was written. All take part.

    Args:
        io: What will read it. If it is not one of this package, nobody but it knows the file.
        path: The file.
        is_first: Whether this is the rank that reads all of it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or damaged.

    """
    base = base_of(io)
    if isinstance(base, AccelCheckpointIO):
        unanimous("looking for a checkpoint", lambda: base.require_intact(path, thoroughly=is_first))


def require_lightning(checkpoint: Mapping[str, Any], path: Any) -> None:
    """Raise unless a Trainer can continue from a checkpoint.

    Raises:
        ValueError: Names what is missing.

    """
    missing = [key for key in ("state_dict", "pytorch-lightning_version") if key not in checkpoint]
    if missing:
        found = ", ".join(map(repr, list(checkpoint)[:5])) or "nothing"
        raise ValueError(
            f"Expected {path} to be a checkpoint of a Lightning Trainer, got one without {' and '.join(missing)} (in it"
            f" are {found}{', ...' if len(checkpoint) > 5 else ''}). To start from a plain state dict call"
            " model.load_state_dict(torch.load(...)) before trainer.fit(model)."
        )


def in_memory(loaded: Any) -> Any:
    """Copy what was loaded out of the file or directory that it may be a part of. Tensors that were one stay one.

    Args:
        loaded: Any nest of collections.

    """
    copies: dict[Hashable, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if isinstance(tensor, StoredTensor):
            if tensor not in copies:
                copies[tensor] = tensor.full()
            return copies[tensor]
        if tensor.device.type != "cpu":
            return tensor
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place not in copies:
            copies[place] = tensor.clone()
        return copies[place]

    return with_tensors(loaded, copied)


def loaded_for(optimizer: Any, state: Any) -> Any:
    """What an optimizer is to load: a copy, if it would keep the tensors that it is given."""
    added = engine_optimizer(optimizer)
    return in_memory(state) if added is None or added.direct else state


def detached(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the values of its parameters just now: they may have others later."""
    for name, value in state.items():
        if isinstance(value, nn.Parameter):
            state[name] = value.detach()
    return state
