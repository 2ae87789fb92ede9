"""What a DeepSpeed file says, on its way into a strategy, a Trainer and a module.

[Note: who wins]
The file says what no argument says. Where both speak they must agree: the strategy's arguments (but for
``bucket_cap_mb``, which is the more precise one and wins), the Trainer's ``precision``, ``accumulate_grad_batches`` and
``gradient_clip_val``. The Trainer's defaults count as silence. An optimizer or a schedule of ``configure_optimizers``
wins over the file's, as a client's does in DeepSpeed, and a warning says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import lightning.pytorch as pl
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves

from lightning_accel.core import Engine, GradScaler
from lightning_accel.core.placement import Row, find_row
from lightning_accel.deepspeed_config import (
    Batches,
    Computing,
    DeepSpeedConfig,
    Known,
    Meaning,
    bucket_cap_mb,
    fill,
    grad_scaler,
    rates_of,
    says_fp32,
)
from lightning_accel.deepspeed_config.keys import KEYS
from lightning_accel.plugins.accel_precision import AccelPrecision
from lightning_accel.strategies import deepspeed_reports
from lightning_accel.strategies.options import EngineOptions

DeepSpeedFile: TypeAlias = str | Path | Mapping[str, Any]
"""A path to a DeepSpeed JSON file, or what would be in it."""

_COMPUTES_IN = {"16": "fp16", "bf16": "bf16", "32": "fp32", "64": "fp64"}
PARTS = ("fp16.", "bf16.", "bfloat16.", "torch_autocast.")
"""Keys that say what is computed in."""
BUCKETS = tuple(name for name in KEYS if name.endswith("_bucket_size"))
"""Keys that the model's width says."""
LOOPS_OWN = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer.type", "scheduler.type"),
)
"""Keys that are the business of a loop of the user's own."""
Plugin = TypeVar("Plugin", bound=FabricPrecision)


class FromFile:
    """A DeepSpeed file in the hands of a strategy.

    Args:
        source: The file.
        stage: What the strategy was given; None if nothing.
        arguments: The strategy's other arguments.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or contradicts an argument.

    """

    def __init__(self, source: DeepSpeedFile, stage: int | None, arguments: Mapping[str, Any]) -> None:
        self._read = self._begun = DeepSpeedConfig.read(source)
        self.config = self._read
        """What it says; in each stage anew, values take the place of ``"auto"`` as they become known."""
        self._meaning = Meaning.of(self.config)
        self.stage: int = self.config["zero_optimization.stage"]
        """The ZeRO stage."""
        if stage is not None and stage != self.stage:
            raise ValueError(
                f"Expected one ZeRO stage, got stage={stage} and zero_optimization.stage {self.stage} in"
                f" {self.config.where}. Leave stage out."
            )
        self._given = dict(arguments)
        self._sets_buckets = "bucket_cap_mb" not in arguments
        self._steps = 0
        self.tell_left_out()

    def tell_left_out(self) -> None:
        """Warn of the file's keys that are not taken over."""
        message = self.config.describe_left_out()
        if message is not None:
            rank_zero_warn(message)

    def conflict(self, name: str, ours: object, theirs: str) -> ValueError:
        """The error of something that is said twice, and differently."""
        return ValueError(
            f"Expected {name} to be said once, got {ours!r} and {theirs} in {self.config.where}. Leave one of them out."
        )

    # ------------------------------------------------------------------------------------------------- strategies

    @property
    def row(self) -> Row:
        """The placement row."""
        return find_row(self._meaning.row)

    @property
    def arguments(self) -> dict[str, Any]:
        """The strategy's arguments, with those that the file says.

        Raises:
            ValueError: If an argument contradicts the file.

        """
        meaning, found = self._meaning, dict(self._given)
        says = {
            "offload": meaning.offload,
            "offload_dir": meaning.offload_dir,
            "reduce_dtype": meaning.reduce_dtype,
            "activation_checkpointing": meaning.activation_checkpointing or None,
        }
        for name, value in says.items():
            if value is None:
                continue
            if found.get(name, value) != value and not (name == "activation_checkpointing" and found[name]):
                raise self.conflict(name, found[name], repr(value))
            found.setdefault(name, value)
        return found

    def lay_out(self, options: EngineOptions, module: nn.Module | None) -> EngineOptions:
        """How the engine lays a model out.

        Args:
            options: What the strategy has by its arguments.
            module: The model, whose width bucket sizes may be left to, at the beginning of a stage; None if there is
                none yet.

        Raises:
            ValueError: If a bucket size is ``"auto"`` and the model does not say how wide it is.

        """
        if module is not None:
            self.config = self._begun
        if module is not None and self._sets_buckets:
            self.config = fill(self.config, Known(ranks=1, hidden_size=hidden_size(module)), BUCKETS)
        joined = bucket_cap_mb(self.config) if self._sets_buckets else options.bucket_cap_mb
        return replace(options, shard_size=self._meaning.shard_size, bucket_cap_mb=joined)

    def precision(self, plugin: Plugin) -> tuple[Plugin | AccelPrecision, GradScaler | None]:
        """The precision plugin to use, and the scaler to give it; None if it has what it needs.

        Raises:
            ValueError: If the Trainer's or Fabric's precision contradicts the file.

        """
        name = str(plugin.precision)
        asked = _COMPUTES_IN.get(name.partition("-")[0], name)
        self.config = self._begun = fill(self._read, Known(ranks=1, precision=asked), PARTS)
        given: GradScaler | None = self._given.get("grad_scaler")
        computing = Computing.of(self.config)
        if computing is None:
            if says_fp32(self.config) and asked in ("fp16", "bf16"):
                raise self.conflict("precision", name, "fp16 and bf16 that are off")
            return plugin, given
        is_default = type(plugin) in (Precision, FabricPrecision)
        if not is_default and (asked != computing.name or not name.endswith("-mixed")):
            raise self.conflict("precision", name, f"{computing.name} with fp32 master values")
        if given is not None and computing.name == "fp16":
            raise self.conflict("the loss scale", "grad_scaler", "fp16")
        scaler = given or grad_scaler(self.config, computing.name)
        if is_default:
            return AccelPrecision(compute=computing.dtype, autocast=computing.autocast), scaler
        return plugin, scaler

    # ---------------------------------------------------------------------------------------------------- Trainer

    def steer(self, trainer: pl.Trainer, ranks: int) -> None:
        """Have a Trainer accumulate and clip as the file says.

        Args:
            trainer: The Trainer, about to fit.
            ranks: How many processes train.

        Raises:
            ValueError: If its own arguments contradict the file, or batch sizes do not add up.

        """
        self._begin_fit(trainer)
        if not trainer.lightning_module.automatic_optimization:
            self._leave_to_training_step()
            return
        known = Known(
            ranks=ranks, accumulation=trainer.accumulate_grad_batches, clipping=trainer.gradient_clip_val or 0.0
        )
        self.config = fill(self.config, known, ("gradient_accumulation_steps", "gradient_clipping"))
        trainer.accumulate_grad_batches = self.accumulation(trainer.accumulate_grad_batches, ranks)
        self._clip(trainer)

    def _begin_fit(self, trainer: pl.Trainer) -> None:
        """Forget what an earlier fit has filled in, and look at the Trainer's arguments; ``lay_out`` has done it."""

    def _leave_to_training_step(self) -> None:
        self.leave_to_loop("training_step, which optimizes by hand,")

    def accumulation(self, ours: int, ranks: int, name: str = "accumulate_grad_batches") -> int:
        """How many micro-batches make a step.

        Args:
            ours: What the loop was given; 1 counts as silence.
            ranks: How many processes train.
            name: Of the loop's argument, for messages.

        Raises:
            ValueError: If batch sizes do not add up, or the argument contradicts the file.

        """
        config = fill(self.config, Known(ranks=ranks, accumulation=ours), "gradient_accumulation_steps")
        train, micro = config.given("train_batch_size"), config.given("train_micro_batch_size_per_gpu")
        asked = config.given("gradient_accumulation_steps")
        if asked is None and (train is None or micro is None) and ours != 1:
            asked = ours
        if train is not None or micro is not None:
            asked = Batches.of(ranks, train, micro, asked, config.where).accumulation
        if asked is None:
            return ours
        if ours not in (1, asked):
            raise self.conflict("accumulation", f"{name}={ours}", f"{asked} batches for each step")
        return asked

    def _clip(self, trainer: pl.Trainer) -> None:
        limit, ours = self.config.given("gradient_clipping"), trainer.gradient_clip_val
        if limit is None:
            if ours is not None:
                return
            limit = self.config["gradient_clipping"]
            rank_zero_info(
                f"{self.config.where}: gradients are clipped to a norm of {limit}, as DeepSpeed does where"
                " gradient_clipping is not given. Write 0 into the file, or say Trainer(gradient_clip_val=0), for none."
            )
        if ours is not None and ours != limit:
            raise self.conflict("clipping", f"gradient_clip_val={ours}", f"gradient_clipping {limit}")
        if limit and trainer.gradient_clip_algorithm == "value":
            raise self.conflict("clipping", "gradient_clip_algorithm='value'", f"gradient_clipping {limit} by norm")
        trainer.gradient_clip_val = limit

    def leave_to_loop(self, whose: str, ranks: int | None = None, keys: Sequence[str] = LOOPS_OWN) -> None:
        """Say which keys are the business of a loop of the user's own; check what can be checked of them.

        Args:
            whose: The loop, for the message.
            ranks: How many processes train, if batch sizes are to be checked.
            keys: Those that it may have to see to.

        Raises:
            ValueError: If batch sizes do not add up.

        """
        config = self.config
        train, micro, accumulation = (config.given(name) for name in LOOPS_OWN[:3])
        if ranks is not None and None not in (train, micro, accumulation):
            Batches.of(ranks, train, micro, accumulation, config.where)
        if self.shows_report and ranks is not None:
            told = deepspeed_reports.describe(config)
            rank_zero_info(f"{config.where}: call lightning_accel.engine_of(model).report() for {told}.")
        found = [name for name in keys if name in config]
        if found:
            rank_zero_warn(
                f"{config.where}: {', '.join(found)} {'is' if len(found) == 1 else 'are'} left to {whose} for which"
                " lightning_accel.deepspeed_config.making has make_optimizer and make_scheduler."
            )

    @property
    def shows_report(self) -> bool:
        """Whether the engine's report is to be shown: at the end of a fit, and every ``steps_per_print`` steps."""
        return deepspeed_reports.shows_report(self.config)

    def watch(self, engine: Engine) -> None:
        """Have an engine's steps timed and counted, if the file asks for it. For each engine, on all ranks."""
        deepspeed_reports.watch(engine, self.config)

    def note_step(self, engine: Engine) -> None:
        """Show an engine's report after an optimizer step, if it is time: every ``steps_per_print`` steps."""
        self._steps += 1
        every = self.config.given("steps_per_print")
        if self.shows_report and every is not None and self._steps % every == 0:
            deepspeed_reports.show(engine)

    def end(self, engine: Engine) -> None:
        """Show an engine's report at the end of a fit, if the file asks for it."""
        if self.shows_report:
            deepspeed_reports.show(engine)

    def require_batches(self, trainer: pl.Trainer, ranks: int) -> None:
        """Raise if the DataLoader's batches are not those of the file.

        Raises:
            ValueError: It shows the sum.

        """
        size = samples_of_batch(trainer)
        if size is None or not trainer.lightning_module.automatic_optimization:
            return  # there is nothing to hold the file's sizes against
        self.require_size(size, trainer.accumulate_grad_batches, ranks)

    def require_size(self, size: int, accumulation: int, ranks: int) -> None:
        """Raise if batches are not those of the file.

        Args:
            size: Samples of a rank's batch.
            accumulation: Batches of a step.
            ranks: How many processes train.

        Raises:
            ValueError: It shows the sum.

        """
        known = Known(ranks=ranks, micro_batch=size, accumulation=accumulation)
        config = fill(self.config, known, ("train_batch_size", "train_micro_batch_size_per_gpu"))
        train, micro = config.given("train_batch_size"), config.given("train_micro_batch_size_per_gpu")
        if train is None and micro is None:
            return
        sizes = Batches.of(ranks, train, micro, accumulation, config.where)
        if sizes.micro != size:
            raise ValueError(
                f"Expected batches of {sizes.micro} samples, as {config.where} says ({sizes.train} ="
                f" {sizes.micro} × {sizes.accumulation} × {ranks}), got a DataLoader with batch_size={size}"
                f" ({size} × {sizes.accumulation} × {ranks} = {size * sizes.accumulation * ranks})."
            )

    @contextmanager
    def configuring(self, module: pl.LightningModule) -> Iterator[None]:
        """Within it, ``configure_optimizers`` of a module returns the file's where its own are missing."""
        own = module.configure_optimizers
        was_replaced = "configure_optimizers" in vars(module)  # by somebody else
        module.__dict__["configure_optimizers"] = lambda: self._completed(own(), module)
        try:
            yield
        finally:
            del module.__dict__["configure_optimizers"]
            if was_replaced:
                module.__dict__["configure_optimizers"] = own

    def _completed(self, returned: Any, module: pl.LightningModule) -> Any:
        from lightning_accel.deepspeed_config.making import make_optimizer

        known = self._known_of(module)
        if returned is not None and "optimizer.type" in self.config:
            rank_zero_warn(
                f"configure_optimizers returned an optimizer, and {self.config.where} has another"
                f" ({self.config['optimizer.type']}): the former is used. Return None for the file's."
            )
        if returned is None:
            self.config = fill(self.config, known, "optimizer.")
            returned = make_optimizer(self.config, module.named_parameters())
        if returned is None or "scheduler.type" not in self.config:
            return returned
        optimizer = _alone(returned)
        if optimizer is None:
            rank_zero_warn(
                f"configure_optimizers returned schedules or several optimizers, and {self.config.where} has a"
                f" scheduler ({self.config['scheduler.type']}): the former are used. Return one optimizer alone for"
                " the file's."
            )
            return returned
        schedule = self._schedule_of(optimizer, module)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _schedule_of(self, optimizer: Optimizer, module: pl.LightningModule) -> LRScheduler | None:
        """The file's schedule, for an optimizer."""
        from lightning_accel.deepspeed_config.making import make_scheduler

        known = replace(self._known_of(module), rates=rates_of(optimizer))
        self.config = fill(self.config, known, "scheduler.")
        return make_scheduler(self.config, optimizer)

    def _known_of(self, module: pl.LightningModule) -> Known:
        total: float | None = None
        if "scheduler.params.total_num_steps" in self.config.automatic:
            total = module.trainer.estimated_stepping_batches
        return Known(
            ranks=module.trainer.world_size,
            lr=_said(module, "lr", "learning_rate"),
            weight_decay=_said(module, "weight_decay"),
            betas=_said(module, "betas"),
            eps=_said(module, "eps"),
            momentum=_said(module, "momentum"),
            warmup_steps=_said(module, "warmup_steps", "warmup_num_steps", "num_warmup_steps"),
            total_steps=int(total) if total is not None and math.isfinite(total) else None,
        )


def _said(module: pl.LightningModule, *names: str) -> Any:
    """What a module or its hparams have under one of some names."""
    for place in (module, module.hparams):
        for name in names:
            value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
            if value is not None:
                return value
    return None


def _alone(returned: Any) -> Optimizer | None:
    """The optimizer, if ``configure_optimizers`` returned one and no schedule."""
    if isinstance(returned, Mapping) and not returned.get("lr_scheduler"):
        returned = returned.get("optimizer")
    if isinstance(returned, (list, tuple)) and len(returned) == 1:
        returned = returned[0]
    return returned if isinstance(returned, Optimizer) else None


def hidden_size(module: nn.Module) -> int | None:
    """How wide a model is, by its config, or that of a model within it (of Transformers, say)."""
    for part in module.modules():
        config = getattr(part, "config", None)
        for place in (config, getattr(config, "text_config", None)):
            size = getattr(place, "hidden_size", None) or getattr(place, "hidden_sizes", None)
            if isinstance(size, (list, tuple)) and size:
                size = max(size)
            if isinstance(size, int):
                return size
    return None


def samples_of_batch(trainer: pl.Trainer) -> int | None:
    """How many samples are in a batch of the training loader; None if it does not say, or there are several."""
    loaders = [leaf for leaf in tree_leaves(trainer.train_dataloader) if hasattr(leaf, "batch_sampler")]
    found = {getattr(leaf.batch_sampler, "batch_size", None) or leaf.batch_size for leaf in loaders}
    return found.pop() if len(found) == 1 else None
