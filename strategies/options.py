"""The settings that all strategies share, and what a user of other strategies may try instead."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins.precision import Precision
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from torch import Tensor, nn

from lightning_accel.core import Engine, GradScaler, PowerSGD
from lightning_accel.core.dtypes import Dtypes
from lightning_accel.core.materialise import InitFn
from lightning_accel.core.offload import OffloadKind
from lightning_accel.core.partition import Units, find_blocks, find_modules
from lightning_accel.core.placement import Rest, Row
from lightning_accel.core.recompute import recompute, require_options
from lightning_accel.plugins.accel_precision import AccelPrecision, PolicyPrecision
from lightning_accel.plugins.precision import Plugin, computes_with, require_suitable, with_engine

Recomputed: TypeAlias = bool | Collection[str | type[nn.Module]]
"""What users may say about activation checkpointing: for all blocks, for none, or for which modules."""

_NOT_NEEDED = {
    "find_unused_parameters": "unused parameters are always found",
    "static_graph": "parameters may be used any number of times",
    "gradient_as_bucket_view": "gradients are always views of flat buffers",
    "broadcast_buffers": "buffers follow rank 0's whenever they change",
    "device_ids": "the Trainer's or Fabric's `devices` says it",
    "output_device": "the Trainer's or Fabric's `devices` says it",
    "delay_all_reduce_named_params": "reductions start when gradients are there",
}
_NOT_OFFERED = {
    "ddp_comm_hook": "gradients are reduced by the engine; use Lightning's strategy='ddp' for communication hooks",
    "ddp_comm_state": "gradients are reduced by the engine; use Lightning's strategy='ddp' for communication hooks",
    "ddp_comm_wrapper": "gradients are reduced by the engine; use Lightning's strategy='ddp' for communication hooks",
    "model_averaging_period": "use Lightning's strategy='ddp' for post-local SGD",
}
_RENAMED = {
    "activation_checkpointing_policy": "is 'activation_checkpointing' here: True, or module names and classes",
}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine lays a model out."""

    units: Units | None = None
    """Names or classes of modules whose parameters are reduced and gathered together."""
    bucket_cap_mb: float = 25.0
    """Neighbouring units are joined up to this size, in MiB."""
    compile: bool | Mapping[str, Any] = False
    """Compile each unit's module: True, or keyword arguments for ``torch.compile``."""
    activation_checkpointing: Recomputed = False
    """Compute activations again in backward: True for each unit's module, or names or classes of modules."""
    activation_checkpointing_options: Mapping[str, Any] | None = None
    """Keyword arguments for ``torch.utils.checkpoint.checkpoint``."""
    shard_size: int | None = None
    """For hybrid rows: how many neighbouring ranks divide a copy of the model state."""
    param_init_fn: InitFn | None = None
    """Sets the values of parts of the model that are on the meta device."""
    offload: OffloadKind | None = None
    """What is kept in host memory: ``"optimizer"`` state, or ``"parameters"`` as well."""
    offload_dir: str | Path | None = None
    """A folder for files that optimizer state is kept in."""
    param_dtype: torch.dtype | None = None
    """What the model computes with instead of wider parameters, and what is gathered."""
    reduce_dtype: torch.dtype | None = None
    """What gradients travel in."""
    gradient_compression: PowerSGD | None = None
    """Has matrices of gradients travel as products of thin ones, under ``ddp``."""

    def __post_init__(self) -> None:
        if not self.bucket_cap_mb > 0:
            raise ValueError(f"Expected bucket_cap_mb to be positive, got {self.bucket_cap_mb}.")
        which, options = self.activation_checkpointing, self.activation_checkpointing_options
        require_recomputed(which)
        require_options(options or {})
        if options and which is False:
            raise ValueError(
                f"Expected activation_checkpointing to be set where it has options, got {which!r} and"
                f" activation_checkpointing_options={dict(options)!r}. Set it to True, or leave the options out."
            )
        backend = self.compile.get("backend") if isinstance(self.compile, Mapping) else None
        if which is not False and backend == "eager":
            raise ValueError(
                "Expected another backend than 'eager' for compile together with activation_checkpointing: with that"
                " one torch draws other random numbers in recomputation than in forward, and gradients after dropout"
                " are wrong. Use 'aot_eager' to debug."
            )

    def adopt(
        self,
        plugin: Plugin,
        row: Row,
        grad_scaler: GradScaler | None,
        accelerator: Accelerator | None,
        start_method: str,
    ) -> Plugin:
        """The plugin that a strategy uses instead of one that it is given.

        Args:
            plugin: What the Trainer or Fabric chose, or the user gave.
            row: The placement row.
            grad_scaler: What the strategy was given.
            accelerator: What the strategy runs on; None if it is not known yet.
            start_method: How processes are started: CUDA must not have started if they are forked.

        Raises:
            ValueError: If it was made for another strategy, contradicts what the strategy was given, or asks for what
                the row or the device cannot do.

        """
        require_suitable(plugin, row)
        changed = with_engine(plugin, grad_scaler)
        self.dtypes(changed, row)
        scaler = getattr(changed, "scaler", None)
        if self.gradient_compression is not None and not isinstance(scaler, GradScaler | None):
            raise ValueError(
                "Expected a lightning_accel.core.GradScaler together with gradient_compression, got"
                f" {type(scaler).__module__}.{type(scaler).__qualname__}: what PowerSGD keeps must follow the loss"
                " scale. Give a GradScaler with grad_scaler=... to the strategy."
            )
        if isinstance(changed, PolicyPrecision) and accelerator is not None:
            changed.connect_device(accelerator.name(), ask=start_method != "fork")
        return changed

    def dtypes(self, precision: Precision, row: Row) -> Dtypes:
        """What the model computes with and what gradients travel in, from the strategy's settings and the plugin's.

        Raises:
            ValueError: If these contradict each other, or the row cannot do it.

        """
        param, reduce, vectors = self.param_dtype or computes_with(precision, row), self.reduce_dtype, False
        if isinstance(precision, PolicyPrecision):
            policy = precision.policy
            asked = {"param": policy.param if policy.autocast else policy.compute, "reduce": policy.reduce}
            for name, ours in (("param", self.param_dtype), ("reduce", reduce)):
                if None not in (ours, asked[name]) and ours is not asked[name]:
                    raise ValueError(
                        f"Expected one {name} dtype, got {name}_dtype={ours} with the strategy and {asked[name]} with"
                        f" {AccelPrecision.__name__}. Leave {name}_dtype out."
                    )
            reduce = reduce or policy.reduce
            vectors = not policy.autocast and param is not None
        return Dtypes.checked(param, reduce, row, vectors=vectors)

    def always(self, row: Row, precision: Precision) -> bool:
        """Whether a model needs an engine even where nothing is trained.

        Parameters may rest sharded; and without autocast nothing else rounds what the model computes with.
        """
        return row.parameters is Rest.SHARDED or self.dtypes(precision, row).vectors

    def start(
        self,
        module: nn.Module,
        row: Row,
        device: torch.device,
        precision: Precision,
        group: dist.ProcessGroup | None = None,
    ) -> Engine:
        """An engine for a module on its device, or on the meta device. All ranks take part.

        Args:
            module: The module.
            row: The placement row.
            device: Where it lives.
            precision: The plugin, which says what to compute with if nothing else does.
            group: The ranks; all by default.

        Raises:
            ValueError: If a unit or a module to recompute does not exist.

        """
        # Before anything has changed: it may raise.
        recomputed = find_recomputed(module, self.activation_checkpointing, self.units)
        dtypes = self.dtypes(precision, row)
        engine = Engine(
            module,
            row,
            units=self.units,
            bucket_cap_mb=self.bucket_cap_mb,
            group=group,
            shard_size=self.shard_size,
            param_init_fn=self.param_init_fn,
            device=device,
            offload=self.offload,
            offload_dir=self.offload_dir,
            param_dtype=dtypes.param,
            reduce_dtype=dtypes.reduce,
            round_vectors=dtypes.vectors,
            gradient_compression=self.gradient_compression,
        )
        engine.at_close.callback(recompute(recomputed.values(), self.activation_checkpointing_options))
        if self.compile is not False:
            arguments = {} if self.compile is True else dict(self.compile)
            for block in engine.blocks.values():
                engine.at_close.callback(setattr, block, "_compiled_call_impl", block._compiled_call_impl)
                block.compile(**arguments)
        return engine


def require_recomputed(which: Recomputed) -> None:
    """Raise unless this says for which modules there is activation checkpointing.

    Raises:
        ValueError: If it does not.

    """
    if not isinstance(which, bool) and not (isinstance(which, Collection) and which) or isinstance(which, str):
        raise ValueError(
            f"Expected activation_checkpointing to be True, False or a list of module names and classes, got {which!r}."
        )


def find_recomputed(module: nn.Module, which: Recomputed, units: Units | None) -> dict[str, nn.Module]:
    """The modules that compute their activations again, by name.

    Args:
        module: The model.
        which: What the user has said.
        units: As for ``Engine``.

    Raises:
        ValueError: If one does not exist, or there are no repeated blocks.

    """
    if which is False:
        return {}
    if which is not True:
        return find_modules(module, which, "activation_checkpointing")
    blocks = find_blocks(module, units)
    if not blocks:
        raise ValueError(
            "Expected the model to have repeated blocks (a ModuleList or Sequential of one class) for"
            " activation_checkpointing=True, found none. Name modules or classes instead."
        )
    return blocks


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move what has values; the rest is made on the device when the engine starts."""

    def move(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else tensor.to(device)

    module._apply(move)
    _update_properties(module, device=device)  # what a LightningModule says of itself


def reject_unknown(strategy: type, unknown: Mapping[str, Any]) -> None:
    """Raise if options were given that a strategy does not have.

    Raises:
        TypeError: Says for each what it was probably meant to be, or why it is not needed.

    """
    if not unknown:
        return
    constructors = [
        vars(base)["__init__"] for base in strategy.__mro__ if "Accel" in base.__name__ and "__init__" in vars(base)
    ]
    known = list(
        dict.fromkeys(
            name
            for constructor in constructors
            for name, parameter in inspect.signature(constructor).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD and name not in ("self", "row")
        )
    )
    lines = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        if name in _RENAMED:
            lines.append(f"{name!r} {_RENAMED[name]}.")
        elif name in _NOT_NEEDED:
            lines.append(f"{name!r} is not needed: {_NOT_NEEDED[name]}. Leave it out.")
        elif name in _NOT_OFFERED:
            lines.append(f"{name!r} is not offered: {_NOT_OFFERED[name]}.")
        elif near:
            lines.append(f"{name!r} is unknown. Did you mean {near[0]!r}?")
        else:
            lines.append(f"{name!r} is unknown.")
    raise TypeError(f"{strategy.__name__}: {' '.join(lines)} Options are {', '.join(known)}.")
