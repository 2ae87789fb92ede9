"""torch's FSDP2, ``fully_shard``."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as torch_states
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

    def save(self, path: Path) -> None:
        """torch.distributed.checkpoint with its default writer, which syncs files."""
        dcp.save(self.state(), checkpoint_id=path)

    def state(self) -> dict[str, Any]:
        """This rank's parts of parameters and moments, by name."""
        return {
            "model": torch_states.get_model_state_dict(self.module),
            "optimizer": torch_states.get_optimizer_state_dict(self.module, self.optimizer),
        }

    def load(self, path: Path) -> None:
        """Into the state dicts, and these into the model and the optimizer."""
        state = self.state()
        dcp.load(state, checkpoint_id=path)
        torch_states.set_model_state_dict(self.module, state["model"])
        torch_states.set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"])
