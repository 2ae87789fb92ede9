"""accel_fsdp and its kin for the Trainer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from typing_extensions import override

from lightning_accel.core.placement import Rest, Row, find_row
from lightning_accel.strategies.trainer import AccelStrategy

SHARDINGS = {"full": "fsdp", "partial": "fsdp_partial", "hybrid": "fsdp_hybrid"}
"""The row of each kind of sharding."""


class AccelFSDPStrategy(AccelStrategy):
    """Fully sharded data parallel: every rank keeps its part of parameters, gradients and optimizer state only.

    A unit's parameters are gathered when forward or backward needs them. Zhao et al., "PyTorch FSDP: Experiences on
    Scaling Fully Sharded Data Parallel", 2023; the same as ZeRO stage 3.

    Args:
        sharding: ``"full"``: each unit's parameters are freed after its forward, and gathered again for its backward.
            ``"partial"``: they stay in between, which takes more memory and sends a third less. ``"hybrid"``: as
            ``"full"`` among the ranks of one machine; each machine has a copy of the state, and gradients are averaged
            over the machines once a step.
        shard_size: For ``"hybrid"``: how many neighbouring ranks divide a copy, instead of those of one machine.
        local_accumulation: While micro-batches accumulate, keep gradients whole on each rank and parameters gathered,
            and send nothing until the last one. Takes memory for the whole model; by default every micro-batch's
            gradients are reduce-scattered. (FSDP's ``no_sync``, which Trainer and Fabric enter by themselves:
            ``accumulate_grad_batches``, ``fabric.no_backward_sync``.)
        kwargs: See :class:`~lightning_accel.strategies.trainer.AccelStrategy`: ``units``, ``bucket_cap_mb``,
            ``compile``, ``activation_checkpointing``, ``activation_checkpointing_options``, ``grad_scaler``,
            ``process_group_backend``, ``timeout``, ``start_method`` and Lightning's own.

    """

    strategy_name = "accel_fsdp"

    def __init__(
        self,
        sharding: str = "full",
        shard_size: int | None = None,
        local_accumulation: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(row_of_sharding(sharding, shard_size, local_accumulation), **kwargs)
        self.sharding = sharding
        self._options = replace(self._options, shard_size=shard_size)

    @classmethod
    @override
    def registered(cls) -> dict[str, dict[str, Any]]:
        return {row: {"sharding": sharding} for sharding, row in SHARDINGS.items()}


def row_of_sharding(sharding: str, shard_size: int | None, local_accumulation: bool) -> Row:
    """The placement row of a kind of sharding.

    Raises:
        ValueError: If there is no such kind, or it takes no ``shard_size``.

    """
    if sharding not in SHARDINGS:
        raise ValueError(f"Expected sharding to be one of {', '.join(map(repr, SHARDINGS))}, got {sharding!r}.")
    row = find_row(SHARDINGS[sharding])
    if shard_size is not None and not row.hybrid:
        raise ValueError(f"Expected shard_size with sharding='hybrid' only, got {shard_size} with {sharding!r}.")
    return replace(row, accumulating=Rest.REPLICATED) if local_accumulation else row
