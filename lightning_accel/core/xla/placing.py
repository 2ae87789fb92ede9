"""The devices in two dimensions, and tensors on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_accel.core.xla.hosts import hosts
from lightning_accel.core.xla.runtime import start
from lightning_accel.core.xla.shardings import REPLICATE, SHARD, Spec, batched


class Placing:
    """Puts tensors on all devices, whole or in parts.

    Args:
        shard_size: How many neighbouring devices divide a copy of the model state; all by default.

    Raises:
        ValueError: If the number of devices is no multiple of it.
        RuntimeError: If XLA cannot start any more.

    """

    def __init__(self, shard_size: int | None = None) -> None:
        import numpy
        from torch_xla.distributed import spmd

        self.devices = start()
        """Of all hosts."""
        self.hosts = hosts()
        self.shard_size = self.devices if shard_size is None else shard_size
        if self.shard_size < 1 or self.devices % self.shard_size:
            raise ValueError(
                f"Expected shard_size to divide the number of XLA devices, {self.devices}, got {shard_size}."
            )
        self.copies = self.devices // self.shard_size
        self.device = torch.device("xla", 0)
        """All of them, as torch sees it."""
        self._spmd = spmd
        order = range(self.devices) if self.hosts.count == 1 else self.hosts.order_of_devices(_own_devices())
        self._mesh = spmd.Mesh(numpy.array(order), (self.copies, self.shard_size), (REPLICATE, SHARD))

    def put(self, tensor: Tensor, spec: Spec) -> Tensor:
        """A copy of a tensor in host memory, on the devices; each is sent its part only.

        Args:
            tensor: The same on every host.
            spec: How it is divided.

        """
        placed = tensor.detach().to(self.device)  # which waits, under SPMD, for what is said next
        self._spmd.mark_sharding(placed, self._mesh, spec)
        return placed

    def annotate(self, tensor: Tensor, spec: Spec) -> Tensor:
        """Say how a value is divided that is to be computed, whatever has been said of it before."""
        import torch_xla

        torch_xla._XLAC._xla_annotate_custom_sharding(tensor, self._mesh.get_op_sharding(spec))
        return tensor

    def put_batch(self, batch: Any) -> Any:
        """A batch on the devices, every tensor of it cut along its first dimension; scalars whole.

        Args:
            batch: Tensors in any nesting. Those that are on an XLA device stay as they are. Of several hosts each has
                its part of the global batch, and all parts have the same shapes.

        Raises:
            ValueError: If a first dimension is no multiple of the number of this host's devices, or there are several
                hosts and a tensor is a scalar.

        """
        return tree_map_only(Tensor, self._put_samples, batch)

    def _put_samples(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "xla":
            return tensor
        here = self.devices // self.hosts.count
        if tensor.dim() and tensor.shape[0] % here:
            where = "" if self.hosts.count == 1 else " of this host"
            raise ValueError(
                f"Expected a batch whose first dimension is a multiple of the {here} XLA devices{where}, got a tensor"
                f" of shape {tuple(tensor.shape)}. Change the batch size, or set drop_last=True for a short last batch."
            )
        if self.hosts.count > 1:
            return self._put_share(tensor)
        return self.put(tensor, batched(tensor.shape))

    def _put_share(self, tensor: Tensor) -> Tensor:
        """This host's part of a batch, as part of the global one: on its own devices."""
        from torch_xla.core import xla_model

        if not tensor.dim():
            raise ValueError(
                f"Expected a batch of tensors with samples in their first dimension, got a scalar ({tensor.dtype}). A"
                " scalar is whole on every device, and each host may have another one. Give it a dimension, one element"
                " for each sample, or make it a Python number that is the same on all hosts."
            )
        sharding = self._spmd.ShardingSpec(self._mesh, batched(tensor.shape), minibatch=True)
        placed: Tensor
        (placed,) = xla_model.send_cpu_data_to_device(tensor.detach(), self.device, sharding)
        return placed

    def bytes_on_one(self, tensor: Tensor) -> int:
        """Bytes that the first device of this host keeps of a tensor, padding included; after what is pending."""
        import torch_xla
        from torch_xla.core import xla_model

        xla_model.wait_device_ops()
        ((part, _), *_) = torch_xla._XLAC._get_local_shards([tensor])[0]
        return int(part.numel() * part.element_size())


def _own_devices() -> list[int]:
    """The numbers of this host's devices, in the order in which it deals its samples to them."""
    import torch_xla

    return [int(name.rpartition(":")[2]) for name in torch_xla._XLAC._xla_get_runtime_devices()]
