"""Who saves and loads in `benchmarks.checkpoint`, one class each: the same model with AdamW, after one step."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as torch_states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from benchmarks.config import Config
from benchmarks.models import Batch, Batches, build_model, build_optimizer
from benchmarks.peers.shard import shard
from lightning_accel.core import Engine
from lightning_accel.core.checkpoint import Reader, Saver
from lightning_accel.core.checkpoint.engine_state import load_model, model_shards, optimizer_shards
from lightning_accel.core.checkpoint.nest import put_tensors
from lightning_accel.strategies.fabric import AccelFSDPStrategy


class Contestant(ABC):
    """One way to save and load. All ranks make it, and call its methods, together.

    Args:
        config: The model, the number of ranks, and which one this is.
    """

    syncs = False
    """Whether files have reached the disk when `save` returns."""
    module: nn.Module
    optimizer: Optimizer

    def __init__(self, config: Config) -> None:
        self.config = config
        self.module = build_model(config)
        self.wrap()
        self.backward(Batches(config).of_rank(0)[0])
        self.optimizer.step()  # from here on there are moments to save
        self.optimizer.zero_grad()

    def wrap(self) -> None:
        """Set `optimizer`, and make of `module` what is trained on all ranks."""
        self.optimizer = build_optimizer(self.module.parameters(), self.config)

    def backward(self, batch: Batch) -> None:
        """Forward and backward of a batch."""
        self.module(*batch).backward()

    @abstractmethod
    def save(self, path: Path) -> None:
        """Save to `path`, where there is nothing."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Load what was saved into the model and the optimizer."""

    def tensors(self) -> Iterable[Tensor]:
        """This rank's memory of what is saved."""
        yield from map(_local, self.module.parameters())
        for values in self.optimizer.state.values():
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

    syncs = True
    row: str

    def wrap(self) -> None:
        """Hang an engine on the module."""
        super().wrap()
        self.engine = Engine(self.module, self.row, group=self.group())
        self.added = self.engine.add_optimizer(self.optimizer)
        self.engine.build()
        collectives = self.engine.collectives
        self.saver = Saver(collectives.gather_objects, collectives.rank)

    def group(self) -> dist.ProcessGroup | None:
        """The ranks that train together; all, if None."""
        return None

    def backward(self, batch: Batch) -> None:
        """The engine's."""
        self.engine.backward(self.module(*batch))

    def save(self, path: Path) -> None:
        """Save a directory, and wait for it."""
        self.saver.save(path, self._state())

    def begin_saving(self, path: Path) -> None:
        """Save in the background: the part that training waits for."""
        self.saver.save(path, self._state(), background=True)

    def finish_saving(self) -> None:
        """Wait for the rest."""
        self.saver.finish()

    def _state(self) -> dict[str, Any]:
        return {"state_dict": model_shards(self.engine), "optimizer_states": [optimizer_shards(self.added)]}

    def load(self, path: Path) -> None:
        """Load a directory of any row and number of ranks."""
        reader = Reader(path)
        saved = put_tensors(reader.objects(), reader.tensors())
        load_model(self.module, saved["state_dict"], engine=self.engine)
        self.optimizer.load_state_dict(saved["optimizer_states"][0])

    def tensors(self) -> Iterator[Tensor]:
        """This rank's part of the units, and of the moments."""
        return _of_engine(self.engine)

    def whole(self) -> dict[str, int]:
        """Checksums of whole parameters and, on rank 0, of their moments, by name: the same for each layout."""
        with self.engine.full_parameters():
            found = {name: _checksum(parameter) for name, parameter in self.module.named_parameters()}
        for number, values in self.optimizer.state_dict().get("state", {}).items():
            found |= {f"{number}.{key}": _checksum(value) for key, value in values.items()}
        return found


class AccelFSDP(Sharded):
    """Parameters and moments rest sharded."""

    row = "fsdp"


class AccelZeRO2(Sharded):
    """Moments rest sharded."""

    row = "zero2"


class AccelAlone(Sharded):
    """Each rank trains for itself."""

    row = "fsdp"

    def group(self) -> dist.ProcessGroup | None:
        """This rank."""
        return dist.new_subgroups(1)[0]


class TorchSave(Contestant):
    """torch.save on each rank, of tensors that are its part of each parameter and moment: as many bytes as ours."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        entries = {f"model.{name}": parameter.detach() for name, parameter in self.module.named_parameters()}
        for name, parameter in self.module.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                entries[f"optimizer.{name}.{key}"] = self.optimizer.state[parameter][key]
        self.mine = {
            key: value.flatten().tensor_split(config.ranks)[config.rank].clone() for key, value in entries.items()
        }
        del self.module, self.optimizer

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

    syncs = True

    def wrap(self) -> None:
        """As torch's tutorial: each block, then the root."""
        shard(self.module, init_device_mesh("cpu", (self.config.ranks,)))
        super().wrap()

    def _state(self) -> dict[str, Any]:
        return {
            "model": torch_states.get_model_state_dict(self.module),
            "optimizer": torch_states.get_optimizer_state_dict(self.module, self.optimizer),
        }

    def save(self, path: Path) -> None:
        """With its default writer, which syncs files."""
        dcp.save(self._state(), checkpoint_id=path)

    def load(self, path: Path) -> None:
        """Into the state dicts, and these into the model and the optimizer."""
        state = self._state()
        dcp.load(state, checkpoint_id=path)
        torch_states.set_model_state_dict(self.module, state["model"])
        torch_states.set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"])


class Full(Contestant):
    """One file of everything, by Fabric and one of its strategies."""

    def strategy(self) -> Any:
        """Fabric's strategy."""
        raise NotImplementedError

    def wrap(self) -> None:
        """``fabric.setup``; the environment says which rank this is, so that Fabric launches nothing."""
        super().wrap()
        self.fabric = lightning.Fabric(accelerator="cpu", devices=self.config.ranks, strategy=self.strategy())
        self.fabric.launch()
        model, optimizer = self.fabric.setup(self.module, self.optimizer)
        self.state: dict[str, Any] = {"model": model, "optimizer": optimizer}

    def backward(self, batch: Batch) -> None:
        """Fabric's."""
        self.fabric.backward(self.state["model"](*batch))

    def save(self, path: Path) -> None:
        """As users do."""
        self.fabric.save(path / "checkpoint.ckpt", self.state)

    def load(self, path: Path) -> None:
        """As users do."""
        self.fabric.load(path / "checkpoint.ckpt", self.state)


class LightningFull(Full):
    """Lightning's DDP and its checkpoint_io: torch.save to memory, and then to the file."""

    def strategy(self) -> str:
        """Lightning's own."""
        return "ddp"


class AccelFull(Full):
    """Ours, from parts on all ranks, which syncs the file."""

    syncs = True

    def strategy(self) -> AccelFSDPStrategy:
        """The row fsdp, saving whole checkpoints."""
        return AccelFSDPStrategy(state_dict_type="full")

    def tensors(self) -> Iterator[Tensor]:
        """This rank's part of the units, and of the moments."""
        return _of_engine(self.state["model"]._forward_module.engine)


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
