"""accel_fsdp and its kin for the Trainer."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_accel.strategies.trainer import AccelStrategy

SHARDINGS = {"full": "fsdp", "partial": "fsdp_partial"}
"""The row of each kind of sharding."""


class AccelFSDPStrategy(AccelStrategy):
    """Fully sharded data parallel: every rank keeps its part of parameters, gradients and optimizer state only.

    A unit's parameters are gathered when forward or backward needs them. Zhao et al., "PyTorch FSDP: Experiences on
    Scaling Fully Sharded Data Parallel", 2023; the same as ZeRO stage 3.

    Args:
        sharding: ``"full"``: each unit's parameters are freed after its forward, and gathered again for its backward.
            ``"partial"``: they stay in between, which takes more memory and sends a third less.
        kwargs: See :class:`~lightning_accel.strategies.trainer.AccelStrategy`: ``units``, ``bucket_cap_mb``,
            ``compile``, ``activation_checkpointing``, ``activation_checkpointing_options``, ``process_group_backend``,
            ``timeout``, ``start_method`` and Lightning's own.

    """

    strategy_name = "accel_fsdp"

    def __init__(self, sharding: str = "full", **kwargs: Any) -> None:
        super().__init__(row_of_sharding(sharding), **kwargs)
        self.sharding = sharding

    @classmethod
    @override
    def registered(cls) -> dict[str, dict[str, Any]]:
        return {row: {"sharding": sharding} for sharding, row in SHARDINGS.items()}


def row_of_sharding(sharding: str) -> str:
    """The placement row of a kind of sharding.

    Raises:
        ValueError: If there is no such kind.

    """
    if sharding not in SHARDINGS:
        raise ValueError(f"Expected sharding to be one of {', '.join(map(repr, SHARDINGS))}, got {sharding!r}.")
    return SHARDINGS[sharding]
