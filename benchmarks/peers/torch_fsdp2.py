"""torch's FSDP2, ``fully_shard``."""

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.models import GPT, build_optimizer
from benchmarks.peers.base import Peer


class TorchFSDP2(Peer):
    """``fully_shard`` on each block and then on the root, as torch's tutorial does.

    With micro-batches it reduces each of them, its default: holding back would keep whole gradients on every rank, and
    give up what it is chosen for.
    """

    module: GPT

    def wrap(self) -> None:
        """Shard in place; the root keeps torch's default, gathered from its forward to its backward."""
        mesh = init_device_mesh("cpu", (self.config.ranks,))
        for block in self.module.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.arguments["reshard_after_forward"])
        fully_shard(self.module, mesh=mesh)
        self.model = self.module
        self.optimizer = build_optimizer(self.module.parameters(), self.config)
