"""The hosts whose devices one program runs on.

[Note: what several hosts must do alike]
Each host runs one process, and all of them record the same programs in the same order: a program that one host has cut
off by itself waits for devices whose hosts do not come. XLA sends what programs compute; what Python decides by
(numbers, names, whether a file was written) hosts tell each other by a process group of torch.distributed on gloo, as
torch_xla has no back end of its own for one program over all devices. Values that are whole on every device are sent
there by each host, so they must be the same on all: those of a model are host 0's.

[Note: the order of devices]
Numbers of devices need not follow their hosts (torch_xla: "Process 0 may not control device 0"). The mesh has them host
by host, each host's own in the runtime's order, which is that in which torch_xla deals a host's samples to them. So a
global batch is the hosts' batches one after the other, and as many neighbours as a host has devices are of one host.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_accel.core.agreement import broadcast_tensors, describe, require_same
from lightning_accel.core.gloo import GlooCollectives
from lightning_accel.core.unanimous import unanimous
from lightning_accel.core.xla.runtime import start

_NOT_RUN = (
    "accel_xla has not been run on several hosts by its authors: what it does there follows torch_xla's sources and"
    " documentation. Compare the losses of a short run with those of one host."
)


@dataclass(frozen=True)
class Hosts:
    """How many hosts there are and which of them this is, and what they tell each other. One needs no process group."""

    count: int = 1
    index: int = 0

    def gather(self, value: Any) -> list[Any]:
        """A picklable object of every host, by host. All hosts take part, likewise below."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The object of one host."""
        if self.count == 1:
            return value
        values = [value if self.index == source else None]
        dist.broadcast_object_list(values, src=source)
        return values[0]

    def barrier(self) -> None:
        """Return when all hosts have come."""
        if self.count > 1:
            dist.barrier()

    def reduce(self, value: Tensor, reduce_op: str = "mean") -> Tensor:
        """One number for each element of tensors of the same shape in host memory, over hosts.

        Args:
            value: This host's.
            reduce_op: ``"mean"`` (or ``"avg"``; of integers it is a fraction), ``"sum"``, ``"min"`` or ``"max"``.

        Raises:
            ValueError: If it is another operation.

        """
        if self.count == 1:
            return value
        reductions: dict[str, Callable[[Tensor], Tensor]] = {
            "mean": lambda stack: stack.mean(0),
            "sum": lambda stack: stack.sum(0),
            "min": lambda stack: stack.amin(0),
            "max": lambda stack: stack.amax(0),
        }
        name = {"avg": "mean"}.get(reduce_op.lower(), reduce_op.lower())
        if name not in reductions:
            raise ValueError(f"Expected reduce_op to be one of {', '.join(map(repr, reductions))}, got {reduce_op!r}.")
        stack = torch.stack(self.gather(value))
        if name == "mean" and not (stack.is_floating_point() or stack.is_complex()):
            stack = stack.to(torch.get_default_dtype())
        return reductions[name](stack)

    def unanimous(self, doing: str, action: Callable[[], None]) -> None:
        """Do something on each host, or fail on all of them; see ``lightning_accel.core.unanimous``."""
        unanimous(doing, action, self.gather)

    def take_first_values(self, module: nn.Module) -> None:
        """Give a module in host memory host 0's parameters and buffers.

        Raises:
            ValueError: If the hosts' models differ in names, shapes or dtypes.

        """
        if self.count > 1:
            messages = GlooCollectives(torch.device("cpu"), None, None)
            require_same(describe(module), messages, "model")
            broadcast_tensors([*module.parameters(), *module.buffers()], messages)

    def order_of_devices(self, own: Sequence[int]) -> list[int]:
        """The numbers of all devices, host by host. See [Note: the order of devices].

        Args:
            own: Those of this host, as the runtime has them.

        Raises:
            ValueError: If hosts have different numbers of devices.

        """
        found = self.gather(list(own))
        if len(set(map(len, found))) > 1:
            raise ValueError(
                f"Expected as many XLA devices on every host, got {list(map(len, found))} by host. torch_xla divides a"
                " global batch evenly."
            )
        return [device for devices in found for device in devices]


def join(count: int, index: int) -> Hosts:
    """Have hosts find each other: start torch.distributed on gloo, unless that has been done.

    Addresses come from ``MASTER_ADDR`` and ``MASTER_PORT`` in the environment or, on TPUs, from torch_xla.

    Args:
        count: How many there are.
        index: Which of them this is.

    Raises:
        ValueError: If torch.distributed runs already, with other ranks or without gloo.

    """
    if count == 1:
        return Hosts()
    if not dist.is_initialized():
        import torch_xla.distributed.xla_backend  # noqa: F401 - knows the method

        dist.init_process_group("gloo", init_method="xla://")
    ranks, rank, backend = dist.get_world_size(), dist.get_rank(), dist.get_backend()
    if (ranks, rank) != (count, index) or backend != "gloo":
        raise ValueError(
            f"Expected torch.distributed to have a process for each host, on gloo, and this to be rank {index} of"
            f" {count}, got rank {rank} of {ranks} on {backend}. Start one process on each host, and leave"
            " torch.distributed to accel_xla."
        )
    return Hosts(count, index)


def hosts() -> Hosts:
    """The hosts of the XLA runtime, which is started. Warns once where there are several.

    Raises:
        ValueError: If torch.distributed runs already and does not fit.
        RuntimeError: If XLA cannot start any more; see core/xla/runtime.py.

    """
    return _found()


@functools.cache
def _found() -> Hosts:
    start()
    from torch_xla import runtime

    count = int(runtime.process_count())
    if count > 1:
        warnings.warn(_NOT_RUN, stacklevel=3)
    return join(count, int(runtime.process_index()))
