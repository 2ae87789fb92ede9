"""How FSDP2 is applied by every peer that uses it."""

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def shard(module: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    """``fully_shard`` on each block and then on the root, as torch's tutorial does; in place.

    Args:
        module: A model with `blocks`. Its root keeps torch's default, gathered from its forward to its backward.
        mesh: The ranks, one dimension.
        options: Passed on to each call; ``reshard_after_forward`` to those of the blocks only.
    """
    of_root = {key: value for key, value in options.items() if key != "reshard_after_forward"}
    for block in cast(nn.ModuleList, module.blocks):
        fully_shard(block, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **of_root)


def policy(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's own mixed precision: parameters gathered in bf16, gradients reduced in fp32."""
    if precision == "32-true":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
