"""Values that a file leaves to the script: ``"auto"``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_accel.deepspeed_config.config import DeepSpeedConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer

_Z = "zero_optimization"


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the Trainer, the model and the optimizer say; None is what they do not say."""

    ranks: int
    """How many processes train."""
    micro_batch: int | None = None
    """Samples in a batch of the DataLoader."""
    accumulation: int | None = None
    """Batches in an optimizer step."""
    clipping: float | None = None
    """Largest norm of the gradients; 0: they are not clipped."""
    precision: str | None = None
    """``"fp16"``, ``"bf16"`` or ``"fp32"``: what is computed in."""
    lr: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None
    warmup_steps: int | None = None
    """Optimizer steps in which the learning rate rises."""
    rates: float | list[float] | None = None
    """Of the optimizer that a schedule is for, whoever has made it: see ``rates_of``."""
    total_steps: int | None = None
    """Optimizer steps of the whole training."""
    hidden_size: int | None = None
    """Width of the model's layers."""


def _hidden(factor: float) -> Callable[[Known], int | None]:
    return lambda known: None if known.hidden_size is None else max(int(factor * known.hidden_size**2), 1)


def _computes_in(dtype: str) -> Callable[[Known], bool | None]:
    return lambda known: None if known.precision is None else known.precision == dtype


_FILLED: dict[str, tuple[Callable[[Known], Any], str]] = {
    "train_micro_batch_size_per_gpu": (lambda known: known.micro_batch, "the DataLoader's batch size"),
    "gradient_accumulation_steps": (lambda known: known.accumulation, "accumulate_grad_batches"),
    "gradient_clipping": (lambda known: known.clipping, "gradient_clip_val"),
    "fp16.enabled": (_computes_in("fp16"), "precision"),
    "bf16.enabled": (_computes_in("bf16"), "precision"),
    "bfloat16.enabled": (_computes_in("bf16"), "precision"),
    "optimizer.params.lr": (lambda known: known.lr, "lr or learning_rate of the module or its hparams"),
    "optimizer.params.weight_decay": (lambda known: known.weight_decay, "weight_decay of the module or its hparams"),
    "optimizer.params.betas": (lambda known: known.betas, "betas of the module or its hparams"),
    "optimizer.params.eps": (lambda known: known.eps, "eps of the module or its hparams"),
    "optimizer.params.momentum": (lambda known: known.momentum, "momentum of the module or its hparams"),
    "scheduler.params.warmup_min_lr": (lambda known: 0.0, "nothing"),
    "scheduler.params.warmup_max_lr": (lambda known: known.rates, "the optimizer's lr"),
    "scheduler.params.warmup_num_steps": (
        lambda known: known.warmup_steps,
        "warmup_steps or warmup_num_steps of the module or its hparams",
    ),
    "scheduler.params.total_num_steps": (lambda known: known.total_steps, "the Trainer's number of steps"),
    f"{_Z}.reduce_bucket_size": (_hidden(1.0), "hidden_size of the model's config"),
    f"{_Z}.allgather_bucket_size": (_hidden(1.0), "hidden_size of the model's config"),
    f"{_Z}.stage3_prefetch_bucket_size": (_hidden(0.9), "hidden_size of the model's config"),
    f"{_Z}.prefetch_bucket_size": (_hidden(0.9), "hidden_size of the model's config"),
}
"""By key: its value, and who says it. Bucket sizes are those that Accelerate takes."""


def rates_of(optimizer: Optimizer) -> float | list[float] | None:
    """The learning rate of an optimizer, for ``Known.rates``: a list if those of its groups differ."""
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    if len(rates) < len(optimizer.param_groups):
        return None
    return rates if len({*rates}) > 1 else rates[0]


def fill(config: DeepSpeedConfig, known: Known, names: str | tuple[str, ...] | None = None) -> DeepSpeedConfig:
    """A configuration with its ``"auto"`` values filled in.

    Args:
        config: The configuration.
        known: What there is to fill them from.
        names: Beginnings of the keys that are to be filled, all by default: not everything is known at once.

    Raises:
        ValueError: If some cannot be filled; it names all of these.

    """
    changes: dict[str, Any] = {}
    missing: list[str] = []
    lr = config.given("optimizer.params.lr")
    for name in config.automatic:
        if names is not None and not name.startswith(names):
            continue
        value, source = None, "nothing says it"
        if name == "train_batch_size":
            micro = config.given("train_micro_batch_size_per_gpu") or known.micro_batch
            accumulation = config.given("gradient_accumulation_steps") or known.accumulation or 1
            value, source = micro and micro * accumulation * known.ranks, "the DataLoader's batch size"
        elif name in _FILLED:
            rule, source = _FILLED[name]
            value = rule(known)
            if value is None and name == "scheduler.params.warmup_max_lr":
                value = known.lr if lr is None else lr
        if value is None:
            missing.append(f"{name} ({source})")
        else:
            changes[name] = value
    if missing:
        raise ValueError(
            f"Expected values for what is 'auto' in {config.where}, got none for {', '.join(missing)}. Write a value"
            " into the file, or give what is named in brackets."
        )
    return config.with_values(changes)
