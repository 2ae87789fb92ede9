"""How the strategies save: whole checkpoints in one file, or directories to which every rank writes its part."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.core.checkpoint import Saver
from lightning_accel.core.placement import Rest, Row

StateDictType = Literal["full", "sharded"]


class Checkpoints:
    """Saves and removes the checkpoints of one strategy.

    Args:
        row: The placement row.
        state_dict_type: What the user has asked for; see ``AccelStrategy``.
        async_save: Write while training goes on.

    Raises:
        ValueError: If it cannot be done so.

    """

    def __init__(self, row: Row, state_dict_type: StateDictType | None, async_save: bool) -> None:
        if state_dict_type not in (None, "full", "sharded"):
            raise ValueError(f"Expected state_dict_type to be 'full' or 'sharded', got {state_dict_type!r}.")
        by_default = row.optimizer_state is Rest.SHARDED
        sharded = by_default if state_dict_type is None else state_dict_type == "sharded"
        if async_save and not sharded:
            raise ValueError(
                "Expected state_dict_type='sharded' with async_save=True, got whole checkpoints. For these, Lightning's"
                " AsyncCheckpointIO does it: plugins=[AsyncCheckpointIO()]."
            )
        self.are_sharded = sharded
        """Whether they are directories."""
        self._asked = state_dict_type
        self.row = row
        """What is written down with a checkpoint."""
        self._async = async_save
        self._saver: Saver | None = None

    def use(self, io: CheckpointIO | None) -> None:
        """Save whole checkpoints, with what the user has given to write them.

        Raises:
            ValueError: If the user has asked for sharded ones.

        """
        if io is None:
            return
        if self._asked == "sharded" or self._async:
            asked = "async_save=True" if self._async else "state_dict_type='sharded'"
            raise ValueError(
                f"Expected no checkpoint_io with {asked}, got {type(io).__name__}: every rank writes its part of a"
                " directory. Leave one of them out."
            )
        self.are_sharded = False

    def save(self, path: str | os.PathLike[str], checkpoint: Any, info: Mapping[str, Any]) -> None:
        """Save a directory. All ranks take part.

        Raises:
            Exception: As ``Saver.save``.

        """
        if self._saver is None:
            self._saver = Saver(_gather, dist.get_rank() if dist.is_initialized() else 0)
        self._saver.save(path, checkpoint, info={"row": self.row.name, **info}, background=self._async)

    def after_saving(self, action: Callable[[], None]) -> None:
        """Do something now or, if a save is under way, when it has succeeded."""
        if self._saver is None:
            action()
        else:
            self._saver.after(action)

    def check(self) -> None:
        """Raise what a save in the background has failed with, if it has. All ranks call this together."""
        if self._saver is not None:
            self._saver.check()

    def finish(self) -> None:
        """Wait for a save in the background, and raise what it has failed with."""
        if self._saver is not None:
            self._saver.finish()


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def only_one(checkpoint: Mapping[str, Any], receiver: nn.Module | Optimizer) -> dict[str, Any]:
    """The state of the one model or optimizer that a checkpoint holds.

    Args:
        checkpoint: It may be that state itself.
        receiver: What is to load it.

    Raises:
        ValueError: If there is none, or several.

    """
    is_model = isinstance(receiver, nn.Module)
    if is_model:
        if isinstance(checkpoint.get("state_dict"), Mapping):
            return dict(checkpoint["state_dict"])
        if any(isinstance(value, Tensor) for value in checkpoint.values()):
            return dict(checkpoint)
        found = {
            key: value
            for key, value in checkpoint.items()
            if isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())
        }
    else:
        if "param_groups" in checkpoint:
            return dict(checkpoint)
        states: dict[Any, Any] = {**checkpoint}
        states |= dict(enumerate(checkpoint.get("optimizer_states", [])))
        found = {key: value for key, value in states.items() if isinstance(value, Mapping) and "param_groups" in value}
    if len(found) != 1:
        what = "model" if is_model else "optimizer"
        raise ValueError(
            f"Expected a checkpoint with the state of one {what}, got {len(found) or 'none'} in one with the keys"
            f" {', '.join(map(repr, checkpoint))}. Name what to load: fabric.load(path, {{{what!r}: {what}}})."
        )
    return dict(next(iter(found.values())))
