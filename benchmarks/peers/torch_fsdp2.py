"""torch's FSDP2, ``fully_shard``."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.distributed.device_mesh import init_device_mesh

from benchmarks.models import build_optimizer
from benchmarks.peers.base import Peer
from benchmarks.peers.shard import policy, shard


class TorchFSDP2(Peer):
    """``fully_shard`` on each block and then on the root.

    With micro-batches it reduces each of them, its default: holding back would keep whole gradients on every rank, and
    give up what it is chosen for.
    """

    def wrap(self) -> None:
        """Shard in place."""
        mesh = init_device_mesh("cpu", (self.config.ranks,))
        reshard = self.arguments["reshard_after_forward"]
        shard(self.module, mesh, reshard_after_forward=reshard, mp_policy=policy(self.config.precision))
        self.model = self.module
        self.optimizer = build_optimizer(self.module.parameters(), self.config)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Nothing: parameters are gathered in what is computed in."""
        return nullcontext()
