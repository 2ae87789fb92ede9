"""Which samples a rank trains with when DeepSpeed divides a model among ranks: those of its data-parallel rank.

[Note: one replica on several ranks]
DeepSpeed's own process groups say which ranks hold the parts of one replica. These get the same samples, and draw the
same random numbers, so that dropout does not tell them apart; batch sizes and sums count replicas, not ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric


@dataclass(frozen=True)
class Division:
    """The replicas of a divided model.

    Args:
        mpu: What DeepSpeed asks for groups of ranks.

    """

    mpu: Any

    @property
    def replicas(self) -> int:
        """How many there are."""
        count: int = self.mpu.get_data_parallel_world_size()
        return count

    @property
    def replica(self) -> int:
        """Which one this rank holds a part of."""
        rank: int = self.mpu.get_data_parallel_rank()
        return rank

    @property
    def parts(self) -> int:
        """How many ranks hold a replica together."""
        count: int = self.mpu.get_model_parallel_world_size()
        return count

    @property
    def across(self) -> Any:
        """The group of ranks that hold the same part, each of another replica."""
        return self.mpu.get_data_parallel_group()

    @property
    def sampler_kwargs(self) -> dict[str, int]:
        """Of a ``DistributedSampler``."""
        return {"num_replicas": self.replicas, "rank": self.replica}

    def agree_on_random_numbers(self) -> None:
        """Have all ranks of a replica go on as its first one would. All ranks take part."""
        group = self.mpu.get_model_parallel_group()
        states = [_collect_rng_states(include_cuda=False)]
        dist.broadcast_object_list(states, src=dist.get_global_rank(group, 0), group=group)
        _set_rng_states(states[0])
        if torch.cuda.is_available():  # of this rank's device: those of the others are the others'
            device_state = [torch.cuda.get_rng_state()]
            dist.broadcast_object_list(device_state, src=dist.get_global_rank(group, 0), group=group)
            torch.cuda.set_rng_state(device_state[0])

    def require_same_samples(self, inputs: Any) -> None:
        """Raise on all ranks of a replica unless they have the same inputs. All of them take part.

        Raises:
            ValueError: If they differ.

        """
        group = self.mpu.get_model_parallel_group()
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, _digest(inputs), group=group)
        if any(one != found[0] for one in found):
            raise ValueError(
                f"Expected the same samples on the {self.parts} ranks that hold the parts of one replica of the model,"
                " got different ones. Leave the sampler to Lightning, or give a DistributedSampler"
                f" num_replicas={self.replicas} and, on this rank, rank={self.replica}."
            )

    @contextmanager
    def counting_replicas(self, module: nn.Module) -> Iterator[None]:
        """Within it the metrics in a module that no group was chosen for count each replica once."""
        found = [part for part in module.modules() if isinstance(part, Metric) and part.process_group is None]
        for metric in found:
            metric.process_group = self.across
        try:
            yield
        finally:
            for metric in found:
                metric.process_group = None


def _digest(inputs: Any) -> str:
    found = hashlib.sha256()
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def divide_tensors(size: int) -> Division:
    """Have DeepSpeed make groups of ranks that hold the parts of each tensor. All ranks take part.

    Args:
        size: How many ranks share a replica.

    Raises:
        ValueError: If ranks cannot be divided so.

    """
    from deepspeed.utils import groups

    ranks = dist.get_world_size()
    if ranks % size:
        raise ValueError(
            f"Expected tensor_parallel.autotp_size to divide the number of ranks, {ranks}, got {size}. Give the Trainer"
            " or Fabric a multiple of it as devices."
        )
    former = groups._TENSOR_MODEL_PARALLEL_GROUP
    if former is not None and dist.get_world_size(former) != size:  # of an earlier fit in this process
        groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = groups._DATA_PARALLEL_GROUP = None
    groups._init_tp_mesh_device(tensor_model_parallel_size=size)
    return Division(groups)
