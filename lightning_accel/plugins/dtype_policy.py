"""Which dtypes a model is kept in, computes with and sends, as one decision that is checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from torch import Tensor, nn

from lightning_accel.core.placement import Rest, Row

_KNOWN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class DtypePolicy:
    """Dtypes of a model's state and computation. Widths are in bytes an element.

    Raises:
        ValueError: If a dtype is not one of fp16, bf16, fp32 and fp64, or the settings contradict each other.

    """

    compute: torch.dtype
    """What forward computes in."""
    autocast: bool
    """Whether ``torch.autocast`` sees to that, or inputs are converted and all parameters are of that dtype."""
    master: torch.dtype
    """What parameters are kept and updated in."""
    param: torch.dtype | None = None
    """What forward and backward see of parameters, and what is gathered; None: as the placement row has it."""
    reduce: torch.dtype | None = None
    """What gradients travel in; None: what they are computed in."""
    buffers: torch.dtype | None = None
    """What floating-point buffers are converted to; None: nothing."""
    float8: Any = False
    """Whether linear layers multiply in fp8: True, or a ``torchao.float8.Float8LinearConfig``."""

    def __post_init__(self) -> None:
        for name in ("compute", "master", "param", "reduce", "buffers"):
            dtype = getattr(self, name)
            if dtype is not None and dtype not in _KNOWN:
                raise ValueError(
                    f"Expected {name} to be one of {', '.join(map(str, _KNOWN))}, got {dtype!r}. Choose one of these,"
                    " or leave it out."
                )
        for name in ("param", "reduce"):
            dtype = getattr(self, name)
            if dtype not in (None, self.master) and dtype.itemsize >= self.master.itemsize:
                raise ValueError(
                    f"Expected {name} to be narrower than master, or the same, got {name}={dtype} and"
                    f" master={self.master}. Leave {name} out, or have a wider master."
                )
        (self._check_autocast if self.autocast else self._check_conversion)()
        if self.float8 and self.compute is not torch.bfloat16:
            raise ValueError(
                f"Expected compute=torch.bfloat16 together with fp8, got {self.compute}: all else is computed in it."
                " Set it, or leave fp8 out."
            )

    def _check_autocast(self) -> None:
        if self.compute not in _NARROW:
            raise ValueError(
                f"Expected compute to be torch.float16 or torch.bfloat16 with autocast=True, got {self.compute}. Set"
                " autocast=False to have inputs and parameters converted instead."
            )
        if self.master is not torch.float32:
            raise ValueError(
                f"Expected master=torch.float32 with autocast=True, got {self.master}, which autocast leaves as it is."
                " Leave master out, or set autocast=False."
            )
        if self.param not in (None, self.compute, self.master):
            raise ValueError(
                f"Expected param to be compute ({self.compute}) or master ({self.master}) with autocast=True, got"
                f" {self.param}: values would be rounded twice, in two ways. Leave it out."
            )

    def _check_conversion(self) -> None:
        if self.param not in (None, self.compute):
            raise ValueError(
                f"Expected param to be compute ({self.compute}) with autocast=False, got {self.param}: layers do not"
                " mix dtypes by themselves. Leave it out, or set autocast=True."
            )
        if self.compute is not self.master and self.compute.itemsize >= self.master.itemsize:
            raise ValueError(
                f"Expected compute to be narrower than master, or the same, with autocast=False, got"
                f" compute={self.compute} and master={self.master}. Leave master out."
            )

    def rounded_to(self, row: Row) -> torch.dtype | None:
        """What parameters are rounded to after each update under a row; None if they stay as they are."""
        if not self.autocast:
            found: torch.dtype | None = self.compute
        elif self.param is None:
            # Where each rank updates all parameters they stay as they are, and autocast rounds them, as Lightning's
            # users know it. Elsewhere every rank has half the bytes, and half of them travel.
            found = self.compute if row.optimizer_state is Rest.SHARDED else None
        else:
            found = self.param
        return None if found is self.master else found

    def convert(self, module: nn.Module) -> nn.Module:
        """Have a module's floating-point parameters and buffers be what the policy says, in place."""

        def convert(tensor: Tensor) -> Tensor:
            dtype = self.master if isinstance(tensor, nn.Parameter) else self.buffers
            return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

        module._apply(convert)  # and not ``to``, which would make complex parameters real
        if not self.autocast:
            _update_properties(module, dtype=self.compute)  # what a LightningModule says of itself
        return module

    def restore(self, module: nn.Module) -> None:
        """Have a module that was given back be of one dtype again, where ``convert`` had buffers be of another."""
        if self.autocast or self.compute is self.master:
            return

        def restore(tensor: Tensor) -> Tensor:
            return tensor.to(self.master) if tensor.dtype is self.buffers else tensor

        module._apply(restore)
        _update_properties(module, dtype=self.master)

    def require_device(self, device: str, *, ask: bool = True) -> None:
        """Raise if a device cannot do it.

        Args:
            device: Its type: ``"cpu"``, ``"cuda"``, …
            ask: Whether the device may be asked what it can do. That starts CUDA, and processes cannot be forked then.

        Raises:
            ValueError: Says what the device lacks, and what to use instead.

        """
        used = {self.compute, self.master, self.param, self.reduce, self.buffers}
        if device == "mps" and torch.float64 in used:
            raise ValueError("Expected dtypes that the device has, got torch.float64 on MPS. Use torch.float32.")
        if device == "cuda" and ask and torch.bfloat16 in used and not torch.cuda.is_bf16_supported():
            raise ValueError(
                f"Expected a CUDA device that has bfloat16, got {torch.cuda.get_device_name()}. Use"
                " torch.float16 (precision='16-mixed')."
            )
