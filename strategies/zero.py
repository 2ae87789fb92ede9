"""accel_zero1, accel_zero2 and accel_zero3 for the Trainer."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_accel.core.placement import Row, find_row
from lightning_accel.strategies.trainer import AccelStrategy

STAGES = {1: "zero1", 2: "zero2", 3: "zero3"}
"""The row of each ZeRO stage."""


class AccelZeROStrategy(AccelStrategy):
    """ZeRO: every rank keeps only its part of the optimizer state, of the gradients and, at stage 3, of the parameters.

    Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020.

    Args:
        stage: 1: gradients are added up on each rank until the accumulation boundary, then reduce-scattered. 2: they
            are reduce-scattered in every backward, so that no rank keeps more than its part. 3: parameters rest
            sharded, too: the same as :class:`~lightning_accel.strategies.fsdp.AccelFSDPStrategy`.
        kwargs: See :class:`~lightning_accel.strategies.trainer.AccelStrategy`: ``units``, ``bucket_cap_mb``,
            ``compile``, ``activation_checkpointing``, ``activation_checkpointing_options``, ``grad_scaler``,
            ``process_group_backend``, ``timeout``, ``start_method`` and Lightning's own.

    """

    strategy_name = "accel_zero"

    def __init__(self, stage: int = 2, **kwargs: Any) -> None:
        super().__init__(row_of_stage(stage), **kwargs)
        self.stage = stage

    @classmethod
    @override
    def registered(cls) -> dict[str, dict[str, Any]]:
        return {row: {"stage": stage} for stage, row in STAGES.items()}


def row_of_stage(stage: int) -> Row:
    """The placement row of a ZeRO stage.

    Raises:
        ValueError: If there is no such stage.

    """
    if stage not in STAGES:
        raise ValueError(f"Expected stage to be one of {', '.join(map(str, STAGES))}, got {stage!r}.")
    return find_row(STAGES[stage])
