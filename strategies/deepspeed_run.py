"""DeepSpeed's engine while it trains: for the Trainer and for Fabric, whose loops say when to step."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer

from lightning_accel.convert.deepspeed import OWN_KEYS
from lightning_accel.convert.deepspeed_files import DeepSpeedFiles, read_deepspeed, require_not_swapped
from lightning_accel.convert.trusted import load_file
from lightning_accel.core.checkpoint.folder import Folder
from lightning_accel.strategies.deepspeed_division import Division
from lightning_accel.strategies.deepspeed_installed import import_deepspeed
from lightning_accel.strategies.deepspeed_model import LentModel
from lightning_accel.strategies.files import in_memory

_TAG = "checkpoint"
"""The folder in a checkpoint's folder; the name that Lightning's own DeepSpeed strategy uses."""


class RunningEngine:
    """DeepSpeed's engine, the model that it was lent, and what it has been given since the last step.

    Args:
        model: What is called.
        module: The model itself, whole; mostly the same.
        optimizer: Of its parameters; None if DeepSpeed makes the one that it is told.
        told: DeepSpeed's configuration.
        device: What is trained on.
        division: How AutoTP divides the model among ranks; None if it does not.

    Raises:
        ValueError: If something else than the configuration has asked for tensor parallelism.

    """

    engine: Any
    """DeepSpeed's."""

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        optimizer: Optimizer | None,
        told: Mapping[str, Any],
        device: Any,
        division: Division | None = None,
    ) -> None:
        self.module = module
        """The model."""
        self.clipping: float = told["gradient_clipping"]
        """The largest norm of gradients that DeepSpeed was told; 0: they are not clipped."""
        self.backwards = 0
        """Since the last step."""
        self.step_was_skipped = False
        """Whether the last step has changed nothing, because of an overflow."""
        self.is_at_work = False
        """Whether DeepSpeed steps, saves or loads just now."""
        self._device: torch.device = device
        deepspeed = import_deepspeed(device)
        self._lent = LentModel(module)
        mpu = None if division is None else division.mpu
        deepspeed.utils.groups.mpu = mpu  # that of an earlier engine, if any, outlives it
        with _config_shown(model):
            self.engine, *_ = deepspeed.initialize(
                args=None if device.index is None else argparse.Namespace(device_rank=device.index),
                model=model,
                model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
                optimizer=optimizer,
                config=dict(told),
                dist_init_required=False,
                mpu=mpu,
            )
        self._lent.note_changes()
        if division is not None:
            self._compare_inputs(division)
        if division is None and self.engine.autotp_size() > 1:
            raise ValueError(
                f"Expected tensor_parallel.autotp_size={self.engine.autotp_size()} in the DeepSpeed file, which deals"
                " samples to ranks, got it from deepspeed.tp_model_init. Leave the call out."
            )
        if self.engine.zero_nvme_offload_optimizer():
            rank_zero_warn(
                "Checkpoints of this run cannot be continued from: with offload_optimizer.device: nvme, DeepSpeed's"
                " lack the optimizer's step and the state of small parameters. With cpu they have them."
            )
        _step_what_schedules_know(self.engine)
        self._drop = self.optimizer.zero_grad
        self.optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]

    def _zero_grad(self, set_to_none: bool = True) -> None:
        # With offload, gradients in host memory are the optimizer's ``grad``, made once: nobody may take them away.
        if self.is_at_work:
            self._drop(set_to_none)
        else:
            self.require_no_gradients()

    def _compare_inputs(self, division: Division) -> None:
        """Hold the first inputs against those of the other ranks of a replica.

        AutoTP's own check, in whose place this is, does not know of lists within lists, as batches are for the Trainer.
        """
        self.engine.first_dataloader_check.remove()

        def compare(module: nn.Module, args: Any, kwargs: Any) -> None:
            handle.remove()
            division.require_same_samples((args, kwargs))

        handle = self.module.register_forward_pre_hook(compare, with_kwargs=True)
        self.engine.first_dataloader_check = handle

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer itself, within DeepSpeed's."""
        optimizer: Optimizer = self.engine.basic_optimizer
        return optimizer

    def add_gradients(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run DeepSpeed's backward: gradients are added to those since the last step."""
        self.backwards += 1
        self.engine.backward(loss, *args, scale_wrt_gas=False, **kwargs)

    def step(self, **kwargs: Any) -> None:
        """Run DeepSpeed's step, if there are gradients: it reduces what is left to, clips and updates."""
        if not self.backwards:
            return
        with self._at_work():
            self.engine.step(**kwargs)
        self.backwards = 0
        self.step_was_skipped = not self.engine.was_step_applied()

    def require_no_gradients(self) -> None:
        """Call for ``zero_grad``: DeepSpeed's step has done it, and what was added since cannot be taken back.

        Raises:
            RuntimeError: If something was.

        """
        if self.backwards:
            raise RuntimeError(
                "Expected optimizer.zero_grad() before backward with strategy='accel_deepspeed', got it after"
                f" {self.backwards}: DeepSpeed's engine has taken these gradients, and drops them in step() only."
            )

    def save(self, path: str, rest: Mapping[str, Any], *, is_first: bool, barrier: Callable[[], None]) -> None:
        """Write a directory as DeepSpeed does; it gets its name when it is complete. All ranks take part.

        Args:
            path: The same one on all ranks.
            rest: What else is to be in it.
            is_first: Whether this is rank 0.
            barrier: Waits for all ranks.

        """
        unfinished = Folder(f"{path}.unfinished")
        if is_first:
            unfinished.remove()
        barrier()
        with self._at_work():
            self.engine.save_checkpoint(str(unfinished), tag=_TAG, client_state=dict(rest))
        barrier()
        if is_first:
            former = unfinished.replace(Folder(path))  # at once: there is always a whole one
            if former is not None:
                former.remove()
        barrier()

    def load(self, folder: Path, *, strict: bool) -> None:
        """Go on from a checkpoint. All ranks take part.

        Args:
            folder: What ``find_deepspeed`` has returned; looked through before.
            strict: Whether it must have every parameter.

        Raises:
            ValueError: If DeepSpeed cannot load it.
            RuntimeError: If there are gradients, which would be stepped with afterwards.

        """
        if self.backwards:
            raise RuntimeError(
                "Expected a checkpoint to be loaded between a step and the next backward with"
                f" strategy='accel_deepspeed', got it after {self.backwards}: DeepSpeed's engine keeps these gradients."
            )
        with self._at_work():
            found, _ = self.engine.load_checkpoint(
                str(folder.parent), tag=folder.name, load_module_strict=strict, load_lr_scheduler_states=False
            )
        if found is None:
            raise ValueError(f"Expected {folder} to be a checkpoint that DeepSpeed can load, but it cannot.")

    def end(self, *, abandon: bool) -> None:
        """Make an end of the engine, and give the model its values again; see ``LentModel.take_back``."""
        del self.optimizer.zero_grad  # the class's own
        self._lent.take_back(self.engine, abandon=abandon)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self.is_at_work = True
        try:
            yield
        finally:
            self.is_at_work = False


@contextmanager
def _config_shown(model: nn.Module) -> Iterator[None]:
    """Within it a model has the ``config`` of a model within it (of Transformers, say), as AutoTP asks for it."""
    found = (part.config for part in model.modules() if hasattr(getattr(part, "config", None), "to_dict"))
    config = next(found, None)
    if config is None or hasattr(model, "config"):
        yield
        return
    model.__dict__["config"] = config
    try:
        yield
    finally:
        del model.__dict__["config"]


def _step_what_schedules_know(engine: Any) -> None:
    """Have ZeRO step the Adagrad that it was given.

    It makes another one, as the constructor makes the state: of one group with the first one's defaults, where neither
    a schedule nor the settings of a group arrive.
    """
    given, zero = engine.basic_optimizer, engine.optimizer
    made = getattr(zero, "optimizer", given)
    if isinstance(given, Adagrad) and made is not given:
        given.state = made.state
        zero.optimizer = given
        if hasattr(zero, "_param_slice_mappings"):  # stages 1 and 2 have gone through the groups already
            zero._link_all_hp_params()
            zero._param_slice_mappings = zero._create_param_mapping()


def require_trainable(module: nn.Module, optimizer: Any) -> None:
    """Raise unless DeepSpeed's engine can train a model with an optimizer.

    Raises:
        ValueError: If its master values would be narrower than the parameters, or the optimizer takes several
            gradients in a step.

    """
    wide = [name for name, parameter in module.named_parameters() if parameter.dtype is torch.float64]
    if wide:
        raise ValueError(
            f"Expected parameters of at most 32 bits with strategy='accel_deepspeed', got float64 ({wide[0]}): its"
            " master values are fp32. Use strategy='accel_zero2'."
        )
    if isinstance(optimizer, LBFGS):
        raise ValueError("Expected an optimizer that steps once with strategy='accel_deepspeed', got LBFGS.")


def only_optimizer(optimizers: list[Any]) -> Any:
    """The one optimizer that there is.

    Raises:
        ValueError: If there are none or several.

    """
    if len(optimizers) != 1:
        raise ValueError(
            f"Expected one optimizer with strategy='accel_deepspeed', got {len(optimizers)}: DeepSpeed's"
            " engine has one. Give one optimizer several parameter groups, or use strategy='accel_zero2'."
        )
    return optimizers[0]


def clipped_otherwise(told: float, asked: str, instead: str) -> ValueError:
    """The error of clipping that is not DeepSpeed's own.

    Args:
        told: The largest norm that it was told; 0 is none.
        asked: What is asked for now.
        instead: What to do.

    """
    return ValueError(
        f"Expected gradients to be clipped as DeepSpeed was told before training (to a norm of {told}; 0 is none), got"
        f" {asked}. {instead}"
    )


def require_local(path: str, storage_options: Any) -> None:
    """Raise unless DeepSpeed can write to a path."""
    if storage_options is not None or "://" in path:
        raise ValueError(f"Expected a local path, to which DeepSpeed writes, got {path} and {storage_options}.")


def read_same_layout(folder: Path, stage: int, ranks: int, *, weights_only: bool) -> DeepSpeedFiles:
    """Read a checkpoint's files, if DeepSpeed can go on from them.

    Args:
        folder: What ``find_deepspeed`` has returned.
        stage: The ZeRO stage that is trained with.
        ranks: How many processes train.
        weights_only: Refuse everything but tensors, numbers, strings, their collections and DeepSpeed's records.

    Raises:
        ValueError: If it was written at another stage or by another number of ranks.

    """
    files = read_deepspeed(folder, weights_only=weights_only)
    _require_same(folder, files.model, stage, ranks, 1)
    return files


def read_divided(folder: Path, stage: int, division: Division, *, weights_only: bool) -> dict[str, Any]:
    """Read what is beside the model in the checkpoint of a divided one, if DeepSpeed can go on from it.

    Args:
        folder: What ``find_deepspeed`` has returned.
        stage: The ZeRO stage that is trained with.
        division: How the model is divided among ranks.
        weights_only: See ``read_same_layout``.

    Raises:
        ValueError: If it was written at another stage, or by ranks that divided it otherwise.

    """
    first = next(iter(sorted(folder.glob("*mp_rank_00_model_states.pt"))), None)
    if first is None:
        raise ValueError(
            f"Expected {folder} to have a file *mp_rank_00_model_states.pt, as DeepSpeed writes, got none."
        )
    require_not_swapped(folder)
    found = load_file(first, weights_only=weights_only)
    _require_same(folder, found, stage, division.replicas, division.parts)
    return {key: value for key, value in in_memory(found).items() if key not in OWN_KEYS}


def _require_same(folder: Path, model: Mapping[str, Any], stage: int, replicas: int, parts: int) -> None:
    written = model.get("ds_config") or {}
    found = (
        (written.get("zero_optimization") or {}).get("stage", 0),
        int(model.get("dp_world_size") or replicas),
        int(model.get("mp_world_size") or 1),
    )
    if found != (stage, replicas, parts):
        layouts = (
            f"stage {stage} on {replicas}{f' × {parts}' * (parts > 1)} ranks"
            for stage, replicas, parts in ((stage, replicas, parts), found)
        )
        expected, got = layouts
        raise ValueError(
            f"Expected a checkpoint of {expected}, got {folder} of {got}: DeepSpeed continues where nothing has"
            " changed. `accel convert` makes one of it, unless the model was divided, that strategy='accel_zero2'"
            " continues from anywhere."
        )
