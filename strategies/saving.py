"""How the Trainer's accel strategies save and load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.core import Engine, Rest
from lightning_accel.core.checkpoint import StoredTensor, is_directory, load
from lightning_accel.core.checkpoint.engine_state import load_model, model_shards, optimizer_shards
from lightning_accel.core.collecting import Collecting
from lightning_accel.core.groups import absent_within
from lightning_accel.core.materialise import has_meta
from lightning_accel.core.placement import Row
from lightning_accel.core.registry import engines_of
from lightning_accel.plugins.checkpoint_io import AccelCheckpointIO, with_default
from lightning_accel.plugins.precision import engine_optimizer
from lightning_accel.strategies.checkpoints import Checkpoints
from lightning_accel.strategies.compact import compact
from lightning_accel.strategies.failure import end_children_at_exit
from lightning_accel.strategies.files import (
    LEFT_IN_FILE,
    detached,
    in_memory,
    loaded_for,
    require_intact,
    require_lightning,
)
from lightning_accel.strategies.fitting import prepare_all
from lightning_accel.strategies.launched import AccelLaunchedStrategy
from lightning_accel.strategies.resume import Continuation
from lightning_accel.strategies.unanimous import unanimous

_GRACE_S = 10.0
"""Seconds that a rank which saves after an exception waits for the others to do the same; as many do children have to
end by themselves after rank 0 failed."""


class SavingStrategy(AccelLaunchedStrategy):
    """Base of ``AccelStrategy``: its checkpoints. It sets the attributes."""

    row: Row
    engine: Engine | None
    _checkpoints: Checkpoints
    _continuation: Continuation
    _was_set_up: bool
    _awaited: tuple[dict[str, Any], bool] | None
    _collecting: Collecting | None = None
    _collects: bool | None = None
    _is_dumping: bool = False  # the model's state was taken, and the checkpoint is not saved yet

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """What reads and writes checkpoint files: the user's or, also within one that wraps others, our own."""
        self._checkpoint_io = with_default(self._checkpoint_io)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoints.use(io)
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state of the model, as it is to be saved.

        Sharded: this rank's parts. Full: ``{}`` on ranks but 0 where no rank has it whole. When the model has been
        given back whole, it is what the model has.
        """
        self._collecting, self._collects = None, None  # of a checkpoint that nobody has saved
        self._is_dumping = True
        if self.row.optimizer_state is Rest.SHARDED or self._checkpoints.are_sharded:
            self._require_peers()
        engines = self._open_engines()
        if self._checkpoints.are_sharded and len(engines) == 1:
            return model_shards(engines[0], self.lightning_module)
        with ExitStack() as stack:
            is_whole = [stack.enter_context(engine.collected_parameters()) for engine in engines]
            state = super().lightning_module_state_dict()
            return detached(state) if all(is_whole) else {}

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, a directory or a file, of any row and number of ranks.

        What the model and the optimizers copy their values from may stay in it.
        """
        self._checkpoints.finish()  # it may be the one that is being written
        if is_directory(checkpoint_path):
            checkpoint = load(checkpoint_path, weights_only=weights_only is not False)
        else:
            require_intact(self.checkpoint_io, checkpoint_path, is_first=self.is_global_zero)
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        require_lightning(checkpoint, checkpoint_path)
        return {key: value if key in LEFT_IN_FILE else in_memory(value) for key, value in checkpoint.items()}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the model's values: of a model that is to rest in parts when it has been set up and has its memory."""
        stored = any(isinstance(value, StoredTensor) for value in checkpoint["state_dict"].values())
        later = stored and self.row.parameters is Rest.SHARDED and not self._was_set_up and not self._open_engines()
        if self.lightning_module is not None and (later or has_meta(self.lightning_module)):
            self._awaited = {"state_dict": checkpoint["state_dict"]}, strict
            return
        assert self.lightning_module is not None
        engines = self._open_engines()
        if len(engines) > 1:
            with self._whole(writeback=True):
                super().load_model_state_dict(checkpoint, strict)
            return
        engine = engines[0] if engines else None
        load_model(self.lightning_module, checkpoint["state_dict"], strict=strict, engine=engine)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer, as it is to be saved.

        Sharded: this rank's parts, by names of parameters. Full: of whole parameters on rank 0; on the others as well
        if it rests replicated, else ``{}``. If nothing is to look at it but what writes it to the file, tensors that
        rest sharded come from their ranks when they are written; see [Note: collected when its turn comes].
        """
        added = engine_optimizer(unwrap(optimizer))
        if self._checkpoints.are_sharded and added is not None:
            return optimizer_shards(added)
        if added is not None and added.sharded and self._is_dumping and self._collects_later(added.engine):
            self._collecting = self._collecting or Collecting(added.engine.collectives)
            return added.state_dict(self._collecting)
        return unwrap(optimizer).state_dict()

    def _collects_later(self, engine: Engine) -> bool:
        """Whether optimizer state is collected when it is written: if no rank has anybody who may look at it."""
        if self._collects is None:
            self._collects = all(engine.collectives.gather_objects(self._is_looked_at_by_nobody))
        return self._collects

    @property
    def _is_looked_at_by_nobody(self) -> bool:
        """Whether all that happens to a checkpoint's values is that they are written to a file of ours, at once."""
        if self._is_interrupted or type(self.checkpoint_io) is not AccelCheckpointIO:
            return False
        module = self.lightning_module
        assert module is not None
        hook = "on_save_checkpoint"
        if is_overridden(hook, module):
            return False
        data = module.trainer.datamodule  # type: ignore[attr-defined]
        callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
        return not (data is not None and is_overridden(hook, data)) and not any(
            is_overridden(hook, callback, parent=Callback) for callback in callbacks
        )

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state of all optimizers, or of none if that of one does not fit."""
        states = checkpoint["optimizer_states"]
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"Expected a checkpoint with the state of {len(self.optimizers)} optimizers, got that of {len(states)}."
                " It was made with another configure_optimizers."
            )
        added = [engine_optimizer(unwrap(optimizer)) for optimizer in self.optimizers]
        pairs = zip(added, states, strict=True)
        prepare_all([partial(ours.prepare_load, state) for ours, state in pairs if ours is not None])
        states = [loaded_for(optimizer, state) for optimizer, state in zip(self.optimizers, states, strict=True)]
        super().load_optimizer_state_dict({"optimizer_states": states})

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        self._is_dumping = False
        self._continuation.add_to(checkpoint)
        if self._checkpoints.are_sharded:
            if storage_options is not None:
                raise TypeError("Expected no storage_options for a sharded checkpoint. Use state_dict_type='full'.")
            info = {"step": checkpoint.get("global_step"), "epoch": checkpoint.get("epoch")}
            self._checkpoints.save(filepath, checkpoint, info)
            return
        save = super().save_checkpoint
        collecting, self._collecting = self._collecting, None

        def write() -> None:
            if self.is_global_zero:
                save(compact(checkpoint), filepath, storage_options)

        if collecting is not None:
            unanimous("saving a checkpoint", partial(collecting.run, write))
        elif self._is_interrupted:
            write()  # some ranks may have ended: those that have not meet at the barrier that follows
        else:
            unanimous("saving a checkpoint", write)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint; not before the one that is being written is complete."""
        remove = super().remove_checkpoint
        self._checkpoints.after_saving(lambda: remove(filepath))

    # ------------------------------------------------------------------ model

    def _open_engines(self) -> list[Engine]:
        """The engines that have the model in parts: of this stage, or left so by another strategy or Trainer."""
        module = self._lightning_module
        found = [] if module is None else engines_of(module)
        ours = self.engine
        if ours is not None and not ours.is_closed and ours.module is self.model and ours not in found:
            found.append(ours)  # all parameters were replaced
        return found

    @contextmanager
    def _whole(self, *, writeback: bool = False) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self._open_engines():
                stack.enter_context(engine.full_parameters(writeback=writeback))
            yield

    # ------------------------------------------------------- other ranks

    def _require_peers(self) -> None:
        """Raise instead of waiting for ranks that do not save: one has failed and its callbacks want a checkpoint."""
        if not self._is_interrupted or self.engine is None or self.engine.is_closed:
            return
        if absent_within(_GRACE_S, self.engine.collectives.group) is not None:
            # What a callback raises within ``on_exception`` keeps Lightning from all that it would do next.
            self._end_soon(grace_s=2.0)  # the others have had theirs
            self.engine.close(abandon=True)
            raise RuntimeError(
                "Expected all ranks to save a checkpoint, as this one does because of an exception (its traceback is"
                f" above), but some have failed or did not come within {_GRACE_S:.0f} s. What rests sharded cannot be"
                " collected without them."
            )

    @property
    def _is_interrupted(self) -> bool:
        module = self.lightning_module
        trainer = None if module is None else module._trainer
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED

    def _end_soon(self, grace_s: float = _GRACE_S) -> None:
        self._failed = True
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            end_children_at_exit(self._launcher.procs, grace_s)

    @override
    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        if name == "Trainer.save_checkpoint":
            self._require_peers()
        super().barrier(name, *args, **kwargs)


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The user's optimizer behind Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
