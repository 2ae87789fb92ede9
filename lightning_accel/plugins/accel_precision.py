"""One precision plugin for every dtype policy, in the Trainer and in Fabric.

It derives from Lightning's ``MixedPrecision``, which has all that a gradient scaler needs (steps, state in checkpoints)
and is what the strategies and Lightning look for. The Trainer's and Fabric's differ in more than names: which method
scales the loss, and whether inputs and outputs are converted under autocast. So what the user makes is the Trainer's
plugin, and Fabric's strategies exchange it for its twin.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from typing_extensions import override

from lightning_accel.plugins.dtype_policy import DtypePolicy
from lightning_accel.plugins.float8 import require_float8, with_float8

_NAMES = {torch.float16: "16", torch.bfloat16: "bf16", torch.float32: "32", torch.float64: "64"}


class PolicyPrecision:
    """What the Trainer's plugin and Fabric's have in common.

    Args:
        policy: The dtypes.

    """

    device: Any  # a str, once a strategy has told it
    precision: Any
    scaler: Any

    def __init__(self, policy: DtypePolicy) -> None:
        self.policy = policy
        """The dtypes."""
        self.device = None
        same = policy.compute is policy.master
        self.precision = f"{_NAMES[policy.compute]}-{'true' if same else 'mixed'}"
        if policy.float8:
            require_float8(policy.float8, None)
            self.precision = "fp8-mixed"
        # As Lightning's plugins have it, whose strategies' users give no device; with_engine replaces it.
        self.scaler = torch.amp.GradScaler("cpu") if policy.compute is torch.float16 and not same else None
        self._desired_input_dtype = policy.compute

    def connect_device(self, device: str, *, ask: bool) -> None:
        """Compute on a device of this type.

        Args:
            device: ``"cpu"``, ``"cuda"``, …
            ask: Whether the device may be asked what it can do. That starts CUDA, and processes cannot be forked then.

        Raises:
            ValueError: If it cannot do it.

        """
        self.policy.require_device(device, ask=ask)
        if self.policy.float8:
            require_float8(self.policy.float8, device, ask=ask)
        self.device = device

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Have parameters, buffers and linear layers be what the policy says.

        Raises:
            ValueError: If the device cannot do it, or the strategy is another package's, which would not round.

        """
        if self.device is None:
            raise ValueError(
                "Expected a strategy of lightning_accel together with AccelPrecision, got another. Use"
                " strategy='accel_ddp' (or another one that begins with accel_), or precision='bf16-mixed'."
            )
        self.connect_device(self.device, ask=True)  # in a process of its own by now
        module = self.policy.convert(module)
        return with_float8(module, self.policy.float8) if self.policy.float8 else module

    def restore_module(self, module: nn.Module) -> None:
        """Take back what ``convert_module`` did, after a stage."""
        self.policy.restore(module)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Within it, parameters are made in the dtype that they are updated in."""
        return _default_dtype(self.policy.master)

    def autocast_context_manager(self) -> torch.autocast:
        """Autocast to the policy's dtype."""
        return torch.autocast(self.device, dtype=self.policy.compute, cache_enabled=False)

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Autocast, or tensors that are made within it are of the dtype that is computed in."""
        with self.autocast_context_manager() if self.policy.autocast else _default_dtype(self.policy.compute):
            yield


class AccelPrecision(PolicyPrecision, MixedPrecision):
    """Dtypes beyond the names of ``precision=``, for ``Trainer(plugins=...)`` and ``Fabric(plugins=...)``.

    ``AccelPrecision(compute=torch.bfloat16)`` is ``precision="bf16-mixed"``. bf16 without autocast and with fp32 values
    that the optimizer updates is ``AccelPrecision(compute=torch.bfloat16, autocast=False)``.

    Args:
        compute: What forward computes in.
        autocast: Whether ``torch.autocast`` sees to that. Otherwise inputs are converted, parameters are rounded after
            each update, and layers compute in what they are given. Default: whether ``compute`` has 16 bits.
        master: What parameters are converted to at set-up, updated and saved in; by default fp32, or ``compute`` if
            that is wider.
        param: What forward and backward see of parameters instead, and what is gathered. By default ``compute``; but
            under autocast vectors keep ``master``, and so do matrices under ``accel_ddp``.
        reduce: What gradients travel in, for rows that reduce in every backward; by default what they are computed in.
        buffers: What floating-point buffers are converted to at set-up. Default: ``compute`` without autocast, nothing
            with it.
        fp8: Have linear layers whose sizes are multiples of 16 multiply in fp8: True, or a
            ``torchao.float8.Float8LinearConfig``. ``precision="fp8-mixed"`` is True together with bf16.

    fp16 with wider master values has a gradient scaler with torch's settings; ``grad_scaler=`` of the strategy is used
    instead.

    Raises:
        ValueError: If the settings contradict each other.
        ModuleNotFoundError: If fp8 is asked for and torchao is not installed.

    """

    def __init__(
        self,
        *,
        compute: torch.dtype = torch.float32,
        autocast: bool | None = None,
        master: torch.dtype | None = None,
        param: torch.dtype | None = None,
        reduce: torch.dtype | None = None,
        buffers: torch.dtype | None = None,
        fp8: Any = False,
    ) -> None:
        if autocast is None:
            autocast = compute in (torch.float16, torch.bfloat16)
        if master is None:
            master = torch.float64 if compute is torch.float64 else torch.float32
        if buffers is None and not autocast:
            buffers = compute
        super().__init__(
            DtypePolicy(
                compute=compute,
                autocast=autocast,
                master=master,
                param=param,
                reduce=reduce,
                buffers=buffers,
                float8=fp8,
            )
        )

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """What the Trainer makes models within."""
        return self.module_init_context()

    @override
    def convert_input(self, data: Any) -> Any:
        """Convert a batch as Lightning's plugins do: not under autocast."""
        if self.policy.autocast:
            return data
        return apply_to_collection(data, Tensor, partial(_converted, self.policy.compute))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the scaler's state where Lightning's plugin looks for it, too."""
        if self.scaler is not None:
            checkpoint[MixedPrecision.__qualname__] = self.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the scaler's state from where Lightning's plugin has left it."""
        state = checkpoint.get(MixedPrecision.__qualname__)
        if state is not None and type(self).__qualname__ not in checkpoint:
            self.load_state_dict(state)

    def in_fabric(self) -> FabricPrecision:
        """The same for Fabric."""
        return FabricPrecision(self.policy)


class FabricPrecision(PolicyPrecision, FabricMixedPrecision):
    """Fabric's twin of :class:`AccelPrecision`; inputs and outputs are converted as by Fabric's own plugins."""

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Within it, tensors are made as inputs are."""
        return nullcontext() if self.policy.autocast else _default_dtype(self.policy.compute)


def _converted(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
