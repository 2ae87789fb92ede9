"""What the Trainer's accel_xla and Fabric's have in common: one process on each host, and one program."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, Precision
from lightning.fabric.utilities.apply_func import _TransferableDataType
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_accel.core import GradScaler
from lightning_accel.core.checkpoint import is_directory, load
from lightning_accel.core.grad_scaler import Surroundings
from lightning_accel.core.partition import Units
from lightning_accel.core.placement import ROWS
from lightning_accel.core.xla import XLAEngine
from lightning_accel.core.xla.hosts import hosts
from lightning_accel.core.xla.scaling import OnDevices
from lightning_accel.plugins.checkpoint_io import with_default
from lightning_accel.strategies.files import require_intact
from lightning_accel.strategies.options import Recomputed, find_recomputed, reject_unknown, require_recomputed
from lightning_accel.strategies.stock import whole


class OneProgram:
    """Base of both strategies, before Lightning's own: the row, and what hosts tell each other."""

    strategy_name = "accel_xla"
    _checkpoint_io: CheckpointIO | None

    def _choose(
        self,
        sharding: str,
        shard_size: int | None,
        units: Units | None,
        activation_checkpointing: Recomputed,
        grad_scaler: GradScaler | None,
        unknown: Mapping[str, Any],
    ) -> None:
        reject_unknown(type(self), unknown)
        if sharding not in ROWS:
            raise ValueError(f"Expected sharding to be one of {', '.join(map(repr, ROWS))}, got {sharding!r}.")
        self.row = ROWS[sharding]
        if shard_size is not None and not self.row.hybrid:
            raise ValueError(
                f"Expected shard_size with sharding='fsdp_hybrid' only, got {shard_size} with {sharding!r}."
            )
        self.sharding = sharding
        self._shard_size = shard_size
        self._units = units
        require_recomputed(activation_checkpointing)
        self._recomputed = activation_checkpointing
        if not isinstance(grad_scaler, GradScaler | None):
            raise TypeError(
                f"Expected grad_scaler to be a lightning_accel.core.GradScaler, got a {type(grad_scaler).__name__}."
            )
        self._given_scaler = grad_scaler

    def _start(self, module: nn.Module) -> XLAEngine:
        """Move a module to the devices, where it rests as the row says.

        Raises:
            ValueError: If a unit or a module to recompute does not exist, or parts of it are on the meta device.

        """
        recomputed = find_recomputed(module, self._recomputed, self._units)  # before anything has changed
        engine = XLAEngine(module, self.row, units=self._units, shard_size=self._shard_size)
        engine.recompute(recomputed.values())
        follow(module, self.root_device)
        return engine

    @property
    def grad_scaler(self) -> GradScaler | None:
        """What scales losses, if anything does."""
        scaler = getattr(self._plugin, "scaler", None)
        return scaler if isinstance(scaler, GradScaler) else None

    @property
    def _plugin(self) -> Precision:
        """The precision plugin, which the Trainer and Fabric call differently."""
        raise NotImplementedError

    def _scale_for(self, *engines: XLAEngine) -> None:
        """Have the scaler, if there is one, scale what these engines train; none: what is in host memory."""
        scaler = self.grad_scaler
        if scaler is not None:  # it may be the user's, for another strategy next
            scaler.surroundings = OnDevices(*engines) if engines else Surroundings()

    @property
    def root_device(self) -> torch.device:
        """All devices, as torch sees them."""
        return torch.device("xla", 0)

    @property
    def num_nodes(self) -> int:
        """Hosts."""
        return hosts().count

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        if num_nodes != 1 and num_nodes != hosts().count:  # one is also what it is if nobody has said anything
            raise ValueError(
                f"Expected num_nodes=1 with accel_xla on {hosts().count} host(s), got {num_nodes}. Leave it out: how"
                " many hosts there are is for the XLA runtime to say."
            )

    @property
    def global_rank(self) -> int:
        """Which of the hosts this is."""
        return hosts().index

    @property
    def local_rank(self) -> int:
        """The only one of its host."""
        return 0

    @property
    def node_rank(self) -> int:
        """Which of the hosts this is."""
        return hosts().index

    @property
    def world_size(self) -> int:
        """Processes, one on each host, not devices: values on the devices are of the global batch already."""
        return hosts().count

    @property
    def is_global_zero(self) -> bool:
        """Whether this host is the one that writes files and shows progress."""
        return hosts().index == 0

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning has to divide the data: each of several hosts loads its part of the global batch."""
        return hosts().count > 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """How samples are divided over hosts; None on one, which loads all of them."""
        found = hosts()
        return {"num_replicas": found.count, "rank": found.index} if found.count > 1 else None

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """What is given, if it is on the devices: it is of the global batch. What is in host memory: of every host.

        Args:
            tensor: On the devices, or of the same shape on each host.
            group: Not used.
            sync_grads: Not used.

        Returns:
            On several hosts, of a tensor in host memory: shape (hosts, …).

        """
        if hosts().count == 1 or not _is_of_this_host(tensor):
            return tensor
        return torch.stack(hosts().gather(tensor.detach()))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all hosts, or any of them, have decided so."""
        decisions = hosts().gather(bool(decision))
        return sum(decisions) == len(decisions) if all else any(decisions)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The picklable object of one host."""
        return hosts().broadcast(obj, src)

    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Return when all hosts have come."""
        hosts().barrier()

    def _reduced(self, value: Any, reduce_op: Any) -> Any:
        """What is given, if it is on the devices: it is of the global batch. What is in host memory, over hosts."""
        return (
            hosts().reduce(value, "mean" if reduce_op is None else str(reduce_op)) if _is_of_this_host(value) else value
        )

    def _set_rank(self) -> None:
        """Have what Lightning does on rank 0 only, such as warnings and logs, be done on host 0 only."""
        if hosts().count > 1:
            rank_zero_only.rank = hosts().index  # type: ignore[attr-defined]

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What reads and writes checkpoint files: the user's or, also within one that wraps others, our own."""
        self._checkpoint_io = with_default(self._checkpoint_io)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io


def _is_of_this_host(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "xla"


def _never() -> bool:
    return False


def follow(module: nn.Module, device: torch.device) -> None:
    """After an engine has moved a module: what the module says of itself, and what it has beside parameters.

    Args:
        module: It is on the devices.
        device: All of them.

    """
    for part in module.modules():
        if isinstance(part, Metric):
            part.to(device)  # its states are neither parameters nor buffers
            if hosts().count > 1:
                part.distributed_available_fn = _never  # they are of the global batch: nothing to be summed over hosts
    _update_properties(module, device=device)  # what a LightningModule says of itself


def seed_devices() -> None:
    """Have what draws random numbers on the devices, such as dropout, begin with torch's seed; host 0's."""
    import torch_xla

    torch_xla.manual_seed(hosts().broadcast(torch.initial_seed() % 2**63))


def put_samples(batch: Any, put_batch: Callable[[Any], Any], device: torch.device) -> Any:
    """A batch on the devices, each tensor cut along its first dimension.

    Args:
        batch: Any nest of collections. What is neither a tensor nor knows how to move stays as it is.
        put_batch: Cuts a tensor.
        device: All devices; for what moves itself, and is whole on each of them.

    Raises:
        ValueError: If a first dimension is no multiple of the number of devices.
        TypeError: If something moves itself, and there are several hosts.

    """

    def put(data: Any) -> Any:
        if isinstance(data, Tensor):
            return put_batch(data)
        if isinstance(data, Mapping):  # such as a tokenizer's
            made: Any = copy.copy(data)
            for key, value in data.items():
                made[key] = put_samples(value, put_batch, device)
            return made
        if hosts().count > 1:
            raise TypeError(
                f"Expected tensors and mappings in a batch on several hosts, got a {type(data).__name__} that moves"
                " itself: it would be whole on every device, and another one for each host. Return its tensors from the"
                " collate_fn."
            )
        moved = data.to(device)
        return data if moved is None else moved

    return apply_to_collection(batch, dtype=_TransferableDataType, function=put)


def read(path: Any, io: CheckpointIO, read_file: Callable[[], Any], weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint as torch knows it: a file, or a directory that another strategy of this package has saved.

    Args:
        path: Where it is.
        io: What reads files.
        read_file: Reads it, if it is one.
        weights_only: As for ``torch.load``; None is for True.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no checkpoint, or damaged.

    """
    if is_directory(path):
        return whole(load(path, weights_only=weights_only is not False))
    require_intact(io, path, is_first=True)
    found: dict[str, Any] = read_file()
    return found
