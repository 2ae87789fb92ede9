"""The collectives that suit a device and a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightning_accel.core.collectives import Collectives
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.groups import backend_of, group_beside
from lightning_accel.core.torch_collectives import TorchCollectives


def connect(device: torch.device, group: dist.ProcessGroup | None = None) -> Collectives:
    """The collectives that suit a device and process group.

    Args:
        device: Where the buffers live.
        group: The process group; the default group if not given. It must be initialised already. On a device other
            than the CPU a group is made beside it (a collective call) for messages that the host reads: reading
            them must not wait for the device.

    Raises:
        RuntimeError: If torch.distributed is not initialised.

    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "Expected an initialised torch.distributed process group, found none. Start the script with torchrun, or"
            " through Lightning's Trainer or Fabric, or call torch.distributed.init_process_group first."
        )
    backend = backend_of(group, device)
    if backend == "fake":
        from lightning_accel.core.simulated import SimulatedCollectives

        return SimulatedCollectives(device, group, group)
    if device.type == "cpu":
        if backend != "gloo":
            return TorchCollectives(device, group, group)
        from lightning_accel.core.direct import DirectCollectives

        messages = GlooCollectives(device, group, group)
        return (messages.ranks > 1 and DirectCollectives.connect(messages)) or messages
    return TorchCollectives(device, group, group_beside(group, device))
