"""Who is compared with whom, as data: one line per peer, one small adapter file per way of training."""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.config import Config

if TYPE_CHECKING:  # the workers read this file before they set what torch reads on import
    from benchmarks.peers.base import Peer

Family = Literal["baseline", "torch", "lightning", "accelerate", "deepspeed", "accel"]


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
    """Packages beyond torch that have to be installed."""
    impossible: str | None = None
    """Why nothing can be installed to make it run on the CPU, if so."""
    ranks_multiple: int = 1
    """It takes this many ranks, or a multiple of it."""
    global_batch: bool = True
    """Whether the peer trains on the batch of all ranks, so that its losses have to be the global ones."""

    def obstacle(self, config: Config) -> str | None:
        """Why this peer cannot take part in a run on this machine, or None if it can."""
        if self.impossible is not None:
            return self.impossible
        if config.ranks % self.ranks_multiple:
            return f"needs {self.ranks_multiple} ranks or a multiple of that, not {config.ranks}"
        for module in self.requires:
            # Found, not imported: that takes seconds. What is found and does not import fails where it is started.
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        return None

    def load(self) -> "type[Peer]":
        """The adapter's class."""
        module, name = self.adapter.split(":")
        adapter: type[Peer] = getattr(importlib.import_module(module, "benchmarks.peers"), name)
        return adapter


_LIGHTNING = ("lightning",)
_ACCEL = ("lightning_accel",)
_CUDA_ONLY = {
    "fsdp": "Lightning's FSDPStrategy is for GPUs only, and says so when it is given a CPU",
    "deepspeed": "Lightning: 'The DeepSpeed strategy is only supported on CUDA GPUs'",
}
_MODEL_PARALLEL = "ModelParallelStrategy, that is FSDP2 on each block and the root"


def _of_lightning(kind: str, strategy: str) -> Spec:
    ours = strategy.startswith("accel")
    what = _MODEL_PARALLEL if strategy == "model_parallel" else repr(strategy)
    return Spec(
        name=f"{kind}_{strategy}",
        adapter=f".{kind}:{kind.capitalize()}Peer",
        family="accel" if ours else "lightning",
        about=f"{kind.capitalize()}(strategy={what})",
        arguments={"strategy": strategy},
        requires=(*_LIGHTNING, *_ACCEL) if ours else _LIGHTNING,
        impossible=_CUDA_ONLY.get(strategy),
    )


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
    Spec(
        name="accelerate_ddp",
        adapter=".hf_accelerate:AccelerateDDP",
        family="accelerate",
        about="Hugging Face Accelerate's prepare on CPU, which is DDP",
        requires=("accelerate",),
    ),
    Spec(
        name="accelerate_fsdp2",
        adapter=".hf_accelerate:AccelerateDDP",
        family="accelerate",
        about="Accelerate with FullyShardedDataParallelPlugin(fsdp_version=2)",
        impossible="Accelerate does not look at its FSDP plugin on CPU: it would be DDP once more",
    ),
    Spec(
        name="accelerate_deepspeed",
        adapter=".hf_deepspeed:AccelerateDeepSpeed",
        family="accelerate",
        about="Accelerate with DeepSpeedPlugin, ZeRO stage 2, settings as deepspeed_zero2",
        arguments={"stage": 2},
        requires=("accelerate", "deepspeed"),
    ),
    *(
        Spec(
            name=f"deepspeed_zero{stage}",
            adapter=".deepspeed_zero:DeepSpeedZeRO",
            family="deepspeed",
            about=f"deepspeed.initialize, ZeRO stage {stage}, torch's fused AdamW, no clipping, buckets of 25 MiB",
            arguments={"stage": stage},
            requires=("deepspeed",),
        )
        for stage in (1, 2, 3)
    ),
    *(
        Spec(
            name=f"{name}{stage}",
            adapter=f".deepspeed_behind:{adapter}",
            family="accel",
            about=f"{about} with deepspeed_zero{stage}'s JSON",
            arguments={"stage": stage},
            requires=(*_LIGHTNING, *_ACCEL, "deepspeed"),
        )
        for name, adapter, about in (
            ("trainer_accel_ds", "TrainerDeepSpeed", "Trainer(strategy='accel_deepspeed'), DeepSpeed's engine,"),
            ("fabric_accel_ds", "FabricDeepSpeed", "Fabric(strategy='accel_deepspeed'), DeepSpeed's engine,"),
            ("fabric_accel_json", "FabricFile", "Fabric(AccelZeROStrategy(config=...)), our engine,"),
        )
        for stage in (1, 2, 3)
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
    Spec(
        name="accel_fsdp_hybrid",
        adapter=".accel:AccelEngine",
        family="accel",
        about="our engine, row fsdp_hybrid, copies of the model state divided over 2 ranks each",
        arguments={"row": "fsdp_hybrid", "shard_size": 2},
        requires=_ACCEL,
        ranks_multiple=4,
    ),
    *(
        Spec(
            name=f"accelerator_{row}",
            adapter=".accelerator:AcceleratorPeer",
            family="accel",
            about=f"our Accelerator's prepare, strategy={row!r}",
            arguments={"strategy": row},
            requires=(*_LIGHTNING, *_ACCEL),
        )
        for row in ("ddp", "zero2", "fsdp")
    ),
    *(
        _of_lightning(kind, strategy)
        for kind in ("trainer", "fabric")
        for strategy in (
            "ddp",
            "model_parallel",
            "fsdp",
            "deepspeed",
            "accel_ddp",
            "accel_zero2",
            "accel_fsdp",
        )
    ),
)

PEERS: dict[str, Spec] = {spec.name: spec for spec in _SPECS}

QUICK_PEERS = (
    "single",
    "torch_ddp",
    "torch_fsdp2",
    "accelerate_ddp",
    "deepspeed_zero2",
    "deepspeed_zero3",
    "accel_ddp",
    "accel_zero2",
    "accel_fsdp",
    "trainer_ddp",
    "trainer_accel_ddp",
    "fabric_ddp",
    "fabric_accel_ddp",
)
"""The peers of a quick run: one of each kind."""

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
