"""Who is compared with whom, as data: one line per peer, one small adapter file per way of training."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the workers read this file before they set what torch reads on import
    from benchmarks.peers.base import Peer

Family = Literal["baseline", "torch", "lightning", "accel"]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One row of the benchmark: which adapter, with which arguments, and what it needs to run."""

    name: str
    adapter: str
    """``module:class``, imported in the workers only; a leading dot stands for `benchmarks.peers`."""
    family: Family
    about: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    """Modules beyond torch that have to import."""
    devices: tuple[str, ...] = ("cpu",)
    """Device types that the adapter can run on."""
    global_batch: bool = True
    """Whether the peer trains on the batch of all ranks, so that its losses have to be the global ones."""

    def obstacle(self, device: str) -> str | None:
        """Why this peer cannot run here, or None if it can."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device}"
        for module in self.requires:
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"{module} does not import: {error}"
        return None

    def load(self) -> "type[Peer]":
        """The adapter's class."""
        module, name = self.adapter.split(":")
        adapter: type[Peer] = getattr(importlib.import_module(module, "benchmarks.peers"), name)
        return adapter


_LIGHTNING = ("lightning",)
_ACCEL = ("lightning_accel.core",)
_ACCEL_LIGHTNING = ("lightning", "lightning_accel.strategies")

_SPECS = (
    Spec(
        name="single",
        adapter=".single:Single",
        family="baseline",
        about="the computation alone: every rank trains its own copy on its own micro-batch, nothing is sent",
        global_batch=False,
    ),
    Spec(name="torch_ddp", adapter=".torch_ddp:TorchDDP", family="torch", about="DistributedDataParallel, defaults"),
    Spec(
        name="torch_zero",
        adapter=".torch_zero:TorchZeRO",
        family="torch",
        about="DistributedDataParallel and ZeroRedundancyOptimizer, defaults",
    ),
    Spec(
        name="torch_fsdp2",
        adapter=".torch_fsdp2:TorchFSDP2",
        family="torch",
        about="fully_shard on each block, then on the root; parameters freed after each forward",
        arguments={"reshard_after_forward": True},
    ),
    Spec(
        name="torch_fsdp2_partial",
        adapter=".torch_fsdp2:TorchFSDP2",
        family="torch",
        about="the same with reshard_after_forward=False: parameters stay gathered until their backward",
        arguments={"reshard_after_forward": False},
    ),
    *(
        Spec(
            name=f"accel_{row}",
            adapter=".accel:AccelEngine",
            family="accel",
            about=f"our engine, row {row}",
            arguments={"row": row},
            requires=_ACCEL,
        )
        for row in ("ddp", "zero1", "zero2", "fsdp", "fsdp_partial")
    ),
    *(
        Spec(
            name=f"{kind}_{strategy}",
            adapter=f".{kind}:{kind.capitalize()}Peer",
            family="accel" if strategy.startswith("accel") else "lightning",
            about=f"{kind.capitalize()}(strategy={strategy!r})",
            arguments={"strategy": strategy},
            requires=_ACCEL_LIGHTNING if strategy.startswith("accel") else _LIGHTNING,
        )
        for kind in ("trainer", "fabric")
        for strategy in ("ddp", "accel_ddp")
    ),
)

PEERS: dict[str, Spec] = {spec.name: spec for spec in _SPECS}

REFERENCE = "torch_ddp"
"""The peer that the ratios are taken to, unless another is asked for."""

ORACLE = Spec(
    name="oracle",
    adapter=".single:Oracle",
    family="baseline",
    about="one process that trains on the batch of all ranks; gives the losses that every peer has to reach",
)


def choose(names: list[str]) -> list[Spec]:
    """The specs of `names`, in the order given."""
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        found = f"Unknown peer: {', '.join(unknown)}" if unknown else "No peer"
        raise ValueError(f"{found}. Expected names out of: {', '.join(PEERS)}.")
    return [PEERS[name] for name in dict.fromkeys(names)]
