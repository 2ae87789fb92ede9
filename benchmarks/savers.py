"""Who saves and loads in `benchmarks.checkpoint`, one class each: the same model with AdamW, after one step.

How most of them do it is the suite's own (`benchmarks.peers`).
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.config import Config
from benchmarks.peers.accel import AccelEngine
from benchmarks.peers.base import Peer
from benchmarks.peers.fabric import FabricPeer
from benchmarks.peers.single import Single
from benchmarks.peers.torch_fsdp2 import TorchFSDP2
from lightning_accel import engine_of
from lightning_accel.core import Engine
from lightning_accel.strategies.fabric import AccelFSDPStrategy


class Contestant(ABC):
    """One way to save and load. All ranks make it, and call its methods, together.

    Args:
        config: The model, the number of ranks, and which one this is.
    """

    peer: Peer
    """A peer of the suite, that has trained one step: from then on there are moments to save."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.peer = self.make()
        self.peer.setup(config)
        self.peer.first_step()
        self.peer.clear()

    @abstractmethod
    def make(self) -> Peer:
        """The peer, not set up yet."""

    def save(self, path: Path) -> None:
        """Save to `path`, where there is nothing."""
        path.mkdir(exist_ok=True)  # by whichever rank comes first
        self.peer.save(path)

    def load(self, path: Path) -> None:
        """Load what was saved into the model and the optimizer."""
        self.peer.load(path)

    def tensors(self) -> Iterable[Tensor]:
        """This rank's memory of what is saved."""
        yield from map(_local, self.peer.module.parameters())
        for values in self.peer.optimizer.state.values():
            yield from (_local(values[key]) for key in sorted(values))

    def digest(self) -> list[int]:
        """Checksums of `tensors`."""
        return [_checksum(tensor) for tensor in self.tensors()]

    def forget(self) -> None:
        """Set all `tensors` to zero."""
        for tensor in self.tensors():
            tensor.zero_()


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _of_engine(engine: Engine) -> Iterator[Tensor]:
    yield from (unit.memory.mine for unit in engine.units)
    for added in engine.optimizers:
        for segment in added.segments:
            values = added.optimizer.state[segment.tensor]
            yield from (values[key] for key in sorted(values))


def _checksum(tensor: Tensor) -> int:
    # A copy: memory that numpy has seen cannot be resized any more, which engines do.
    return zlib.crc32(tensor.detach().flatten().clone().view(torch.uint8).numpy())


class Sharded(Contestant):
    """Our engine and its Saver: each rank writes its part of a directory."""

    row: ClassVar[str]
    peer: AccelEngine

    def make(self) -> AccelEngine:
        """The engine."""
        return AccelEngine(row=self.row)

    def begin_saving(self, path: Path) -> None:
        """Save in the background: the part that training waits for."""
        path.mkdir(exist_ok=True)
        self.peer.begin_saving(path, background=True)

    def finish_saving(self) -> None:
        """Wait for the rest."""
        self.peer.saver.finish()

    def tensors(self) -> Iterator[Tensor]:
        """This rank's part of the units, and of the moments."""
        return _of_engine(self.peer.engine)

    def whole(self) -> dict[str, int]:
        """Checksums of whole parameters and, on rank 0, of their moments, by name: the same for each layout."""
        peer = self.peer
        with peer.engine.full_parameters():
            found = {name: _checksum(parameter) for name, parameter in peer.module.named_parameters()}
        for number, values in peer.optimizer.state_dict().get("state", {}).items():
            found |= {f"{number}.{key}": _checksum(value) for key, value in values.items()}
        return found


class AccelFSDP(Sharded):
    """Parameters and moments rest sharded."""

    row = "fsdp"


class AccelZeRO2(Sharded):
    """Moments rest sharded."""

    row = "zero2"


class _Alone(AccelEngine):
    def group(self) -> dist.ProcessGroup | None:
        return dist.new_subgroups(1)[0]


class AccelAlone(Sharded):
    """Each rank trains for itself."""

    def make(self) -> AccelEngine:
        """The engine of this rank."""
        return _Alone(row="fsdp")


class TorchSave(Contestant):
    """torch.save on each rank, of tensors that are its part of each parameter and moment: as many bytes as ours."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        module, states = self.peer.module, self.peer.optimizer.state
        entries = {f"model.{name}": parameter.detach() for name, parameter in module.named_parameters()}
        for name, parameter in module.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                entries[f"optimizer.{name}.{key}"] = states[parameter][key]
        self.mine = {
            key: value.flatten().tensor_split(config.ranks)[config.rank].clone() for key, value in entries.items()
        }
        self.peer.teardown()

    def make(self) -> Single:
        """What its tensors are taken from."""
        return Single()

    def save(self, path: Path) -> None:
        """One file for each rank."""
        path.mkdir(exist_ok=True)
        torch.save(self.mine, path / f"__{self.config.rank}_.pt")

    def load(self, path: Path) -> None:
        """Read this rank's file, and copy it to where the tensors are."""
        for key, value in torch.load(path / f"__{self.config.rank}_.pt", weights_only=True).items():
            self.mine[key].copy_(value)

    def tensors(self) -> Iterable[Tensor]:
        """This rank's part."""
        return self.mine.values()


class TorchDCP(Contestant):
    """torch.distributed.checkpoint with FSDP2 and its get_… and set_…_state_dict."""

    def make(self) -> TorchFSDP2:
        """FSDP2."""
        return TorchFSDP2(reshard_after_forward=True)


class LightningFull(Contestant):
    """Fabric with Lightning's DDP and its checkpoint_io: torch.save to memory, and then to the one file."""

    def make(self) -> FabricPeer:
        """Lightning's own."""
        return FabricPeer(strategy="ddp")


class _Full(FabricPeer):
    def strategy(self) -> AccelFSDPStrategy:
        return AccelFSDPStrategy(state_dict_type="full")


class AccelFull(Contestant):
    """Fabric with ours: one file from parts on all ranks."""

    def make(self) -> FabricPeer:
        """The row fsdp, saving whole checkpoints."""
        return _Full(strategy="accel_fsdp")

    def tensors(self) -> Iterator[Tensor]:
        """This rank's part of the units, and of the moments."""
        return _of_engine(engine_of(self.peer.module))


CONTESTANTS: dict[str, type[Contestant]] = {
    "torch_save": TorchSave,
    "accel_fsdp": AccelFSDP,
    "accel_zero2": AccelZeRO2,
    "torch_fsdp2_dcp": TorchDCP,
    "lightning_full": LightningFull,
    "accel_full": AccelFull,
}
REFERENCE = "torch_save"
"""Whose speed the others are compared with."""
