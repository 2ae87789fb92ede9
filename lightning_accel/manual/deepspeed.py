"""What a DeepSpeed file says of a manual loop: accumulation, clipping, batch sizes, the optimizer and the schedule.

[Note: clipped once]
The file's limit is applied by ``PreparedOptimizer.step``, unless the loop has clipped these gradients itself since the
last step. Where the file has a number both must be the same; where it has none, or ``"auto"``, the loop's own counts,
and without one DeepSpeed's limit of 1.0 does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_accel.deepspeed_config import Computing, Known, fill, making, rates_of
from lightning_accel.deepspeed_config.keys import KEYS

if TYPE_CHECKING:
    from lightning_accel.manual.optimizer import PreparedOptimizer
    from lightning_accel.strategies.deepspeed_file import FromFile

_ARGUMENT = "gradient_accumulation_steps"


class LoopFile:
    """A DeepSpeed file in the hands of an ``Accelerator``.

    Args:
        file: What the strategy has read.
        ranks: How many processes train.
        accumulation: Micro-batches of a step, as the script says; 1 counts as silence.

    Raises:
        ValueError: If batch sizes do not add up, or the script contradicts the file.

    """

    def __init__(self, file: FromFile, ranks: int, accumulation: int) -> None:
        self._file = file
        self._ranks = ranks
        self.where = file.config.where
        """The file's name, for messages."""
        self.accumulation = file.accumulation(accumulation, ranks, _ARGUMENT)
        """Micro-batches of a step."""
        self._limit: float | None = file.config.given("gradient_clipping")
        self._optimizers: list[Optimizer] = []
        self._schedules: list[LRScheduler] = []
        self._checked: list[Any] = []
        self._has_stepped = False

    @property
    def mixed_precision(self) -> str | None:
        """``"fp16"`` or ``"bf16"``; None if the file leaves that open."""
        computing = Computing.of(self._file.config)
        return None if computing is None else computing.name

    def require_steps(self, steps: int) -> None:
        """Raise if the loop changes the number of micro-batches of a step to another than the file's."""
        if steps != self.accumulation:
            raise self._file.conflict(_ARGUMENT, steps, f"{self.accumulation} batches for each step")

    def require_batches(self, loader: Any) -> None:
        """Raise if the batches of a prepared loader that is trained with are not those of the file.

        Args:
            loader: The one that the loop is in; None if it is in none.

        """
        total = getattr(loader, "total_batch_size", None)
        if total is None or any(loader is other for other in self._checked):
            return
        self._file.require_size(total // self._ranks, self.accumulation, self._ranks)
        self._checked.append(loader)

    # --------------------------------------------------- optimizer and schedule

    def make_optimizer(self, model: nn.Module, **auto: Any) -> Optimizer:
        """The file's optimizer, see ``Accelerator.make_optimizer``."""
        known = Known(ranks=self._ranks, **auto)
        made = making.make_optimizer(fill(self._file.config, known, "optimizer."), model.named_parameters())
        if made is None:
            raise ValueError(
                f"Expected an optimizer in {self.where}, got none. Make one of torch.optim from model.parameters()."
            )
        self._optimizers.append(made)
        return made

    def make_scheduler(self, optimizer: Optimizer, total_steps: int | None, warmup_steps: int | None) -> LRScheduler:
        """The file's schedule, see ``Accelerator.make_scheduler``."""
        known = Known(
            ranks=self._ranks,
            rates=rates_of(optimizer),
            total_steps=total_steps,
            warmup_steps=warmup_steps,
        )
        made = making.make_scheduler(fill(self._file.config, known, "scheduler."), optimizer)
        if made is None:
            raise ValueError(f"Expected a scheduler in {self.where}, got none. Make one of torch.optim.lr_scheduler.")
        self._schedules.append(made)
        return made

    def has_made(self, scheduler: Any) -> bool:
        """Whether a schedule is the file's: it counts optimizer steps, not batches."""
        return any(scheduler is made for made in self._schedules)

    # -------------------------------------------------------------------- steps

    def require_norm(self, max_norm: float, norm_type: float) -> bool:
        """What the loop's clipping by norm is to the file's.

        Returns:
            Whether it takes the place of the file's; one with an infinite limit only measures.

        Raises:
            ValueError: If it contradicts the file.

        """
        if math.isinf(max_norm):
            return False
        if self._limit is not None and (float(max_norm) != self._limit or float(norm_type) != 2.0):
            ours = f"clip_grad_norm_(..., {max_norm}{'' if norm_type == 2.0 else f', norm_type={norm_type}'})"
            raise self._file.conflict("clipping", ours, f"gradient_clipping {self._limit}")
        return True

    def require_value(self) -> None:
        """Raise if the file clips by norm: the loop clips by value."""
        if self._limit:
            raise self._file.conflict("clipping", "clip_grad_value_", f"gradient_clipping {self._limit} by norm")

    def before_step(self, optimizer: PreparedOptimizer, closure: object) -> None:
        """Clip gradients that the loop has not clipped. See [Note: clipped once].

        Raises:
            ValueError: If the step computes them first, in a closure.

        """
        limit: float = KEYS["gradient_clipping"].default if self._limit is None else self._limit
        if not self._has_stepped:
            self._has_stepped = True
            self._say_what_is_unused(optimizer.optimizer)
            if self._limit is None and not optimizer.was_clipped:
                rank_zero_info(
                    f"{self.where}: gradients are clipped to a norm of {limit}, as DeepSpeed does where"
                    " gradient_clipping is not given. Write 0 into the file for none, or call clip_grad_norm_."
                )
        if not limit or optimizer.was_clipped:
            return
        if closure is not None:
            raise ValueError(
                f"Expected a step without a closure, whose gradients {self.where} has clipped (gradient_clipping"
                f" {limit}), got one with a closure. Call backward before it, or write 0 into the file."
            )
        optimizer.unscale()
        optimizer.added.engine.clip_grad_norm_(optimizer.optimizer, limit, 2.0, False)

    def after_step(self, optimizer: PreparedOptimizer) -> None:
        """Show the engine's report, if the file asks for it now."""
        self._file.note_step(optimizer.added.engine)

    def _say_what_is_unused(self, optimizer: Optimizer) -> None:
        config = self._file.config
        if "optimizer.type" in config and not any(optimizer is made for made in self._optimizers):
            rank_zero_warn(
                f"The script has made an optimizer, and {self.where} has another ({config['optimizer.type']}): the"
                " former is used. accelerator.make_optimizer(model) makes the file's."
            )
        if "scheduler.type" in config and not self._schedules:
            rank_zero_warn(
                f"{self.where} has a scheduler ({config['scheduler.type']}) that is not used:"
                " accelerator.make_scheduler(optimizer) makes it."
            )


class MakesByFile:
    """The part of an ``Accelerator`` that makes what a DeepSpeed file describes."""

    _file: LoopFile | None

    def make_optimizer(
        self,
        model: nn.Module,
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        momentum: float | None = None,
    ) -> Optimizer:
        """The optimizer that the DeepSpeed file describes, for a model's parameters; pass it on to ``prepare``.

        Args:
            model: Whose parameters that require gradients it updates.
            lr: Takes the place of ``"auto"`` in the file, as the other ones do.
            weight_decay: Likewise.
            betas: Likewise.
            eps: Likewise.
            momentum: Likewise.

        Raises:
            ValueError: If there is no file, none in it, or something is ``"auto"`` and not given.

        """
        return self._required("make_optimizer").make_optimizer(
            model, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, momentum=momentum
        )

    def make_scheduler(
        self, optimizer: Any, *, total_num_steps: int | None = None, warmup_num_steps: int | None = None
    ) -> LRScheduler:
        """The learning rate schedule that the DeepSpeed file describes; pass it on to ``prepare``.

        It steps once for each optimizer step, on any number of ranks, as it does in DeepSpeed.

        Args:
            optimizer: Whose learning rate follows it, prepared or not; its rate takes the place of an ``"auto"``
                ``warmup_max_lr``.
            total_num_steps: In optimizer steps; takes the place of ``"auto"`` in the file, as the next does.
            warmup_num_steps: Likewise.

        Raises:
            ValueError: As ``make_optimizer``.

        """
        inner = getattr(optimizer, "optimizer", optimizer)
        return self._required("make_scheduler").make_scheduler(inner, total_num_steps, warmup_num_steps)

    def _required(self, verb: str) -> LoopFile:
        if self._file is None:
            raise ValueError(
                f"Expected a DeepSpeed file for {verb}, got none. Use Accelerator(deepspeed_config='ds.json') or accel"
                " launch --deepspeed_config ds.json, or make one of torch's."
            )
        return self._file
