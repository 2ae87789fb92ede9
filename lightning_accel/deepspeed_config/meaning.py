"""What a configuration means for the engine: its row, where state rests, dtypes and the loss scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_accel.deepspeed_config.config import SIZES, DeepSpeedConfig
from lightning_accel.deepspeed_config.values import AUTO

if TYPE_CHECKING:
    import torch

    from lightning_accel.core.grad_scaler import GradScaler

_Z = "zero_optimization"
_ROWS = {0: "ddp", 1: "zero1", 2: "zero2", 3: "fsdp"}
_MIB = 2**20
_ELEMENT = 4
"""Bytes of an element in a bucket: parameters rest in fp32."""
DEFAULT_BUCKET_MB = 25.0
"""What units are joined up to where a file says nothing, in MiB."""


@dataclass(frozen=True)
class Meaning:
    """Where model state rests, in the words of the strategies."""

    row: str
    """The placement row's name."""
    shard_size: int | None
    """For ``fsdp_hybrid``: how many ranks divide a copy."""
    offload: Literal["optimizer", "parameters"] | None
    offload_dir: str | None
    reduce_dtype: torch.dtype | None
    activation_checkpointing: bool

    @staticmethod
    def of(config: DeepSpeedConfig) -> Meaning:
        """What a configuration means; it may have values still to be filled in.

        Raises:
            ValueError: If something that must be known when a strategy is made is ``"auto"``.

        """
        needed = (
            *(f"{_Z}.offload_", f"{_Z}.zero_hpz", f"{_Z}.mics", "communication_data_type", "activation_checkpoint"),
            *("wall_clock_breakdown", "flops_profiler."),
        )
        unknown = [name for name in config.automatic if name.startswith(needed)]
        if unknown:
            raise ValueError(
                f"Expected values in {config.where}, got 'auto' for {', '.join(unknown)}, which nothing else says."
                " Write them into the file."
            )
        stage = config[f"{_Z}.stage"]
        sizes = [size for name in SIZES if (size := config[f"{_Z}.{name}"]) > 1]
        optimizer = "cpu" if config[f"{_Z}.cpu_offload"] is True else config[f"{_Z}.offload_optimizer.device"]
        parameters = "cpu" if config[f"{_Z}.cpu_offload_param"] is True else config[f"{_Z}.offload_param.device"]
        offload: Literal["optimizer", "parameters"] | None = None
        if parameters != "none":
            offload = "parameters"
        elif optimizer != "none":
            offload = "optimizer"
        checkpointing = ("number_checkpoints", "partition_activations", "cpu_checkpointing")
        return Meaning(
            row="fsdp_hybrid" if sizes else _ROWS[stage],
            shard_size=sizes[0] if sizes else None,
            offload=offload,
            offload_dir=config[f"{_Z}.offload_optimizer.nvme_path"] if optimizer == "nvme" else None,
            reduce_dtype=_dtype(config.given("communication_data_type")),
            activation_checkpointing=any(config[f"activation_checkpointing.{name}"] for name in checkpointing),
        )


def bucket_cap_mb(config: DeepSpeedConfig) -> float:
    """What neighbouring units are joined up to, in MiB.

    DeepSpeed's sizes are elements, and its files often have half a billion, so that everything is one bucket. Here
    that would undo the overlap with backward, and at stage 3 gather the whole model: sizes lower the default only.

    Args:
        config: A configuration without ``"auto"`` for the bucket sizes; those that have it are not looked at.

    """
    stage = config[f"{_Z}.stage"]
    names = ["reduce_bucket_size"]
    if stage in (1, 2):
        names.append("allgather_bucket_size")
    if stage == 3:
        names += ["stage3_prefetch_bucket_size", "prefetch_bucket_size"]
    # 0 turns an optimisation of DeepSpeed's off, and there is nothing to join units of no size to.
    sizes = [size for name in names if (size := config.given(f"{_Z}.{name}"))]
    return min([DEFAULT_BUCKET_MB, *(size * _ELEMENT / _MIB for size in sizes)])


@dataclass(frozen=True)
class Computing:
    """What a file has forward and backward compute in."""

    dtype: torch.dtype
    autocast: bool
    """``torch.autocast`` decides by operation, instead of the whole model computing in ``dtype``."""

    @property
    def name(self) -> str:
        """``"fp16"`` or ``"bf16"``."""
        return "fp16" if str(self.dtype) == "torch.float16" else "bf16"

    @staticmethod
    def of(config: DeepSpeedConfig) -> Computing | None:
        """What a configuration says; None if it says nothing, or leaves it to the Trainer or Fabric."""
        import torch

        for section, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16)):
            if config[f"{section}.enabled"] is True:
                return Computing(dtype, autocast=config[f"{_Z}.stage"] == 0)  # ranks would keep parameters twice
        if config["torch_autocast.enabled"] is True:
            narrow = "16" in config["torch_autocast.dtype"] and "b" not in config["torch_autocast.dtype"]
            narrow = narrow or config["torch_autocast.dtype"] == "half"
            return Computing(torch.float16 if narrow else torch.bfloat16, autocast=True)
        return None


def says_fp32(config: DeepSpeedConfig) -> bool:
    """Whether a file says that nothing is computed in 16 bits: both are there and off."""
    return all(config.given(f"{section}.enabled") is False for section in ("fp16", "bf16"))


def grad_scaler(config: DeepSpeedConfig, computes_in: str | None) -> GradScaler | None:
    """The loss scaler that a configuration describes.

    Args:
        config: The configuration, filled in.
        computes_in: ``"fp16"``, ``"bf16"`` or another.

    Returns:
        For fp16 one with the file's loss-scale keys, by DeepSpeed's rule; for bf16 one that skips steps whose gradients
        are not finite, unless ``check_grad_overflow`` is false; None otherwise.

    """
    from lightning_accel.core.grad_scaler import GradScaler

    if computes_in == "bf16":
        sections = ("bf16", "bfloat16")
        checks = all(config[f"{section}.check_grad_overflow"] is not False for section in sections)
        asked = any(config[f"{section}.enabled"] in (True, AUTO) for section in sections)
        return GradScaler("static", init_scale=1.0) if checks and asked else None
    if computes_in != "fp16":
        return None
    scale = config["fp16.loss_scale"]
    if scale:
        return GradScaler("static", init_scale=scale)
    settings: dict[str, Any] = {
        "init_scale": 2.0 ** config["fp16.initial_scale_power"],
        "growth_interval": config["fp16.loss_scale_window"],
        "hysteresis": config["fp16.hysteresis"],
        "consecutive_hysteresis": config["fp16.consecutive_hysteresis"],
        "min_scale": float(config["fp16.min_loss_scale"]),
    }
    return GradScaler("deepspeed", **settings)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
