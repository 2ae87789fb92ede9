"""accel_ddp for the Trainer."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_accel.core.placement import find_row
from lightning_accel.strategies.trainer import AccelStrategy


class AccelDDPStrategy(AccelStrategy):
    """Data parallel: every rank keeps the whole model, its gradients and the optimizer state; gradients all-reduce.

    Args:
        kwargs: See :class:`~lightning_accel.strategies.trainer.AccelStrategy`: ``units``, ``bucket_cap_mb``,
            ``compile``, ``activation_checkpointing``, ``activation_checkpointing_options``, ``grad_scaler``,
            ``reduce_dtype``, ``gradient_compression``,
            ``process_group_backend``, ``timeout``, ``start_method`` and Lightning's own.

    """

    strategy_name = "accel_ddp"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(find_row("ddp"), **kwargs)

    @classmethod
    @override
    def registered(cls) -> dict[str, dict[str, Any]]:
        return {"ddp": {}}
