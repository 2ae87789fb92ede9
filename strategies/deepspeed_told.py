"""What DeepSpeed's own engine is told: a file, with what the Trainer says where the file leaves it open.

[Note: said once]
Lightning divides each loss by ``accumulate_grad_batches`` and says when to step; DeepSpeed adds gradients up until then
(``managed_gradient_accumulation: false``), and its ``backward`` divides by nothing. DeepSpeed alone clips, in its step,
to the limit that the file or the Trainer gives. The Trainer and the file must agree, or one of them be silent. If both
are, nothing is clipped. A loop with Fabric does what the Trainer does; how many micro-batches it steps after is held
against the file.

[Note: groups of one]
With NVMe offload DeepSpeed 0.19.8 reads gradients from files into the place that a parameter has in its sub-group, and
what is read to a place that is not aligned for direct I/O comes out wrong: half of a matrix after five small parameters
moved the wrong way. Nothing says so. Where each parameter is a sub-group of its own, that place is the beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.accelerators import CPUAccelerator as FabricCPUAccelerator
from lightning.fabric.plugins.precision import HalfPrecision as FabricHalfPrecision
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.deepspeed_config import Batches, Computing, Known, fill, says_fp32
from lightning_accel.deepspeed_config.values import AUTO
from lightning_accel.strategies.deepspeed_file import (
    BUCKETS,
    LOOPS_OWN,
    PARTS,
    DeepSpeedFile,
    FromFile,
    hidden_size,
)

PRECISIONS = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
"""What ``precision=`` may be, and what forward and backward compute in."""
_PLUGINS = (
    *(Precision, HalfPrecision, MixedPrecision),
    *(FabricPrecision, FabricHalfPrecision, FabricMixedPrecision),
)
_LEFT_TO_FABRIC = ("optimizer.type", "scheduler.type")
_OTHER_PARALLELISM = ("sequence_parallel_size", "data_parallel_size", "expert_parallel")
_Z = "zero_optimization"


class EngineFile(FromFile):
    """A DeepSpeed file on its way to DeepSpeed.

    Args:
        source: The file; None for one that says the stage only.
        stage: What the strategy was given. Default: what the file says, or 2 if there is none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, has another stage, or asks for what a Trainer cannot give.

    """

    def __init__(self, source: DeepSpeedFile | None, stage: int | None) -> None:
        if source is None:
            source = {_Z: {"stage": 2 if stage is None else stage}}
        super().__init__(source, stage, {})
        config = self.config
        if found := [name for name in config.values if name.partition(".")[0] in _OTHER_PARALLELISM]:
            raise ValueError(
                f"Expected a file for data, tensor or pipeline parallelism in {config.where}, got {', '.join(found)}:"
                " whole samples are dealt to ranks, and experts are on all of them. Leave them out."
            )
        if self.stage < 2 and config.given(f"{_Z}.overlap_comm") is True:
            raise ValueError(
                f"Expected {_Z}.overlap_comm to be false at stage {self.stage} in {config.where}, got true: DeepSpeed"
                " overlaps there only if it counts micro-batches itself, and Lightning does. Leave it out."
            )

    @override
    def tell_left_out(self) -> None:
        """Nothing is: DeepSpeed gets every key."""

    def computes_in(self, plugin: FabricPrecision, accelerator: object = None) -> tuple[str, bool]:
        """The precision, as the Trainer calls it, and whether DeepSpeed autocasts.

        Args:
            plugin: The Trainer's or Fabric's.
            accelerator: Likewise; on the CPU there is no fp16.

        Raises:
            ValueError: If there is no such precision in DeepSpeed, or the file contradicts it.

        """
        name, autocasts = self._agreed(plugin)
        if name == "16-mixed" and isinstance(accelerator, (CPUAccelerator, FabricCPUAccelerator)):
            raise ValueError(
                "Expected precision='bf16-mixed' or '32-true' on the CPU with strategy='accel_deepspeed', got"
                " fp16, which DeepSpeed has for CUDA only. strategy='accel_zero2' has it on the CPU, too."
            )
        return name, autocasts

    def _agreed(self, plugin: FabricPrecision) -> tuple[str, bool]:
        name = str(plugin.precision)
        if type(plugin) not in _PLUGINS or name not in PRECISIONS:
            given = repr(name) if type(plugin).__module__.startswith("lightning.") else type(plugin).__name__
            raise ValueError(
                f"Expected precision to be one of {', '.join(map(repr, PRECISIONS))} with strategy='accel_deepspeed',"
                f" got {given}."
            )
        asked = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[PRECISIONS[name]]
        self.config = self._begun = fill(self._read, Known(ranks=1, precision=asked), PARTS)
        computing = Computing.of(self.config)
        if computing is None:
            if asked != "fp32" and says_fp32(self.config):
                raise self.conflict("precision", name, "fp16 and bf16 that are off")
            return name, False
        autocasts = self.config["torch_autocast.enabled"] is True
        if asked == "fp32":
            return ("16-mixed" if computing.name == "fp16" else "bf16-mixed"), autocasts
        if asked != computing.name or (autocasts and not name.endswith("-mixed")):
            raise self.conflict("precision", name, f"{computing.name}{' autocast' if autocasts else ''}")
        return name, autocasts

    @override
    def _begin_fit(self, trainer: pl.Trainer) -> None:
        self.config = self._begun
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise ValueError(
                "Expected gradient_clip_algorithm='norm' with strategy='accel_deepspeed', got 'value': DeepSpeed clips"
                " by norm only."
            )

    @override
    def _leave_to_training_step(self) -> None:
        asked = self.config.given("gradient_accumulation_steps")
        if asked not in (None, 1):
            raise ValueError(
                f"Expected no gradient_accumulation_steps in {self.config.where} with manual optimization, got {asked}:"
                " DeepSpeed steps whenever training_step does. Leave it out."
            )

    def steer_pipeline(self, trainer: pl.Trainer, replicas: int) -> int:
        """Have a Trainer clip as the file says, and leave micro-batches to DeepSpeed.

        Args:
            trainer: The Trainer, about to fit a pipeline.
            replicas: How many pipelines there are.

        Returns:
            How many micro-batches a batch is cut into.

        Raises:
            ValueError: If the Trainer's own arguments contradict the file, or a pipeline cannot do with them.

        """
        self._begin_fit(trainer)
        if not trainer.lightning_module.automatic_optimization:
            raise ValueError(
                "Expected automatic optimization with a PipelineModule, got automatic_optimization=False: a call of the"
                " pipeline is a whole step already."
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "Expected accumulate_grad_batches=1 with a PipelineModule, got"
                f" {trainer.accumulate_grad_batches}: each batch is a step. Say gradient_accumulation_steps, the"
                " micro-batches that it is cut into, in the DeepSpeed file, and give the DataLoader larger batches."
            )
        known = Known(ranks=replicas, accumulation=1, clipping=trainer.gradient_clip_val or 0.0)
        self.config = fill(self.config, known, ("gradient_accumulation_steps", "gradient_clipping"))
        self._clip(trainer)
        return self.accumulation(1, replicas)

    def require_pipeline_batches(self, size: int, micro_batches: int, replicas: int) -> None:
        """Raise unless the DataLoader's batches can be cut into the file's micro-batches.

        Args:
            size: Samples of a replica's batch.
            micro_batches: How many it is to be cut into.
            replicas: How many pipelines there are.

        Raises:
            ValueError: If they cannot.

        """
        micro = self.config.given("train_micro_batch_size_per_gpu")
        train = self.config.given("train_batch_size")
        if train is not None:
            micro = Batches.of(replicas, train, micro, micro_batches, self.config.where).micro
        if size % micro_batches or micro not in (None, size // micro_batches):
            raise ValueError(
                f"Expected batches that are {micro_batches} micro-batches"
                f"{'' if micro is None else f' of {micro} samples'}, as {self.config.where} says, got a DataLoader with"
                f" batch_size={size}."
            )

    def begin_loop(self, ranks: int) -> int | None:
        """Begin anew for a model of a loop of the user's own, and say what is left to it.

        Args:
            ranks: How many processes train.

        Returns:
            How many micro-batches make a step, if the file says so.

        Raises:
            ValueError: If batch sizes do not add up.

        """
        self.config = self._begun
        self.leave_to_loop("the loop,", keys=_LEFT_TO_FABRIC)
        train, micro, asked = (self.config.given(name) for name in LOOPS_OWN[:3])
        return None if asked is None and None in (train, micro) else self.accumulation(1, ranks)

    @property
    def tensor_parallel_size(self) -> int:
        """How many ranks share each tensor (AutoTP); 1 if the file says nothing."""
        section = self.config["tensor_parallel"] or {}
        return max(1, int(section.get("autotp_size") or 0))

    @property
    def clipping(self) -> float | None:
        """The largest norm of gradients, if the file has one."""
        limit: float | None = self.config.given("gradient_clipping")
        return limit

    @override
    def _clip(self, trainer: pl.Trainer) -> None:
        if self.config.given("gradient_clipping") is not None:
            super()._clip(trainer)

    def told(
        self, ranks: int, module: nn.Module, precision: str, *, accumulation: int, clipping: float | None
    ) -> dict[str, Any]:
        """What DeepSpeed is told, without an optimizer and a schedule. See [Note: said once].

        Args:
            ranks: How many processes train.
            module: The model, whose width bucket sizes may be left to.
            precision: What ``computes_in`` has returned.
            accumulation: Micro-batches of a step.
            clipping: The largest norm of gradients; None or 0 is none.

        Raises:
            ValueError: If what is ``"auto"`` cannot be filled in.

        """
        self.config = fill(self.config, Known(ranks=1, hidden_size=hidden_size(module)), BUCKETS)
        found = self._said(precision)
        train, micro = (self.config.given(name) for name in ("train_batch_size", "train_micro_batch_size_per_gpu"))
        if train is None and micro is None:
            micro = 1  # until the loader is there: see `samples_of_batch`
        sizes = Batches.of(ranks, train, micro, accumulation, self.config.where)
        found |= {
            "train_batch_size": sizes.train,
            "train_micro_batch_size_per_gpu": sizes.micro,
            "gradient_accumulation_steps": sizes.accumulation,
            "gradient_clipping": float(clipping or 0.0),
            "managed_gradient_accumulation": False,
        }
        found.setdefault("zero_allow_untested_optimizer", True)
        self._group_what_is_in_files(found.get(_Z) or {})
        return found

    def _group_what_is_in_files(self, zero: dict[str, Any]) -> None:
        """See [Note: groups of one]."""
        if (zero.get("offload_optimizer") or {}).get("device") != "nvme":
            return
        if zero.get("sub_group_size", 1) != 1:
            rank_zero_warn(
                f"{self.config.where}: sub_group_size={zero['sub_group_size']} is taken for 1. With"
                " offload_optimizer.device: nvme, DeepSpeed reads gradients of larger groups wrongly."
            )
        zero["sub_group_size"] = 1

    def _said(self, precision: str) -> dict[str, Any]:
        """The file, without an optimizer, a schedule and what is ``"auto"``, with the precision.

        Raises:
            ValueError: If parameters in files would be rounded.

        """
        found = _nested({name: value for name, value in self.config.values.items() if value != AUTO})
        for part in ("optimizer", "scheduler"):
            found.pop(part, None)
        offloaded = (found.get(_Z) or {}).get("offload_param") or {}
        if offloaded.get("device") == "nvme" and PRECISIONS[precision] is torch.float32:
            raise ValueError(
                f"Expected offload_param.device: cpu in {self.config.where} with precision='{precision}', got nvme:"
                " DeepSpeed rounds what it keeps there to 16 bits. Or train with precision='bf16-mixed'."
            )
        section = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(PRECISIONS[precision])
        if section is not None and Computing.of(self.config) is None:
            found[section] = {**found.get(section, {}), "enabled": True}
        return found

    def told_before(self, precision: str) -> dict[str, Any]:
        """What ``zero.Init`` is told, before there is a model. It divides parameters whatever batch sizes will be."""
        found = self._said(precision)
        for name in LOOPS_OWN[:3]:
            found.pop(name, None)
        return {**found, "train_micro_batch_size_per_gpu": 1}

    def optimizer_section(self) -> dict[str, Any]:
        """The file's ``"optimizer"``, filled in by ``configuring``."""
        values = {name: value for name, value in self.config.values.items() if value != AUTO}
        section: dict[str, Any] = _nested(values)["optimizer"]
        return section

    @override
    def _completed(self, returned: Any, module: pl.LightningModule) -> Any:
        if returned is not None:
            return super()._completed(returned, module)
        if "optimizer.type" not in self.config:
            raise ValueError(
                "Expected an optimizer for strategy='accel_deepspeed', got None from configure_optimizers and no"
                f" optimizer in {self.config.where}. Return one, or name one in the file."
            )
        self.config = fill(self.config, self._known_of(module), "optimizer.")
        return _MockOptimizer()  # DeepSpeed makes the file's

    def schedule(self, optimizer: Optimizer, module: pl.LightningModule) -> list[LRSchedulerConfig]:
        """The file's schedule for the file's optimizer, if it has one."""
        if "scheduler.type" not in self.config:
            return []
        scheduler = self._schedule_of(optimizer, module)
        return [LRSchedulerConfig(cast(Any, scheduler), interval="step")]


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections within sections, as in a file."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        *sections, own = name.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[own] = value
    return found
