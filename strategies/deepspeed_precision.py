"""Precision where DeepSpeed's own engine converts the model, scales losses, clips and steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.fabric.plugins.precision.utils import _convert_fp_tensor, _DtypeContextManager
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.strategies.deepspeed_run import clipped_otherwise
from lightning_accel.strategies.deepspeed_told import PRECISIONS

if TYPE_CHECKING:
    from lightning_accel.strategies.deepspeed_engine import AccelDeepSpeedStrategy


class EngineRounding(FabricPrecision):
    """What is left to do beside DeepSpeed's engine: inputs and outputs, and parameters that come in 16 bits.

    Args:
        precision: ``"32-true"``; ``"bf16-mixed"`` or ``"16-mixed"``: DeepSpeed rounds the model and keeps fp32 master
            values; ``"bf16-true"``: the model comes in bf16, and the master values begin as rounded.
        autocasts: DeepSpeed runs forward within torch's autocast, and nothing is converted.

    """

    def __init__(self, precision: str, autocasts: bool) -> None:
        self.precision = precision  # type: ignore[assignment]
        self.autocasts = autocasts
        self._dtype = PRECISIONS[precision]

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(self._dtype) if self.precision == "bf16-true" else module

    @override
    def convert_input(self, data: Any) -> Any:
        """Inputs for the model as it rests; a 32-bit one that no engine has rounded takes them as they are."""
        return self.rounded(data) if self.precision == "bf16-true" else data

    def rounded(self, data: Any) -> Any:
        """Inputs for a model that the engine has."""
        return data if self.autocasts else self._converted(data, self._dtype)

    @override
    def convert_output(self, data: Any) -> Any:
        return self._converted(data, torch.get_default_dtype())

    def _converted(self, data: Any, dtype: torch.dtype) -> Any:
        if self._dtype is torch.float32:
            return data
        return apply_to_collection(data, function=_convert_fp_tensor, dtype=Tensor, dst_type=dtype)

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return _DtypeContextManager(self._dtype) if self.precision == "bf16-true" else nullcontext()

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()


class EnginePrecision(EngineRounding, Precision):
    """The same for the Trainer, which backward and step go through.

    Args:
        precision: See ``EngineRounding``.
        autocasts: Likewise.
        strategy: Whose engine it is.

    """

    def __init__(self, precision: str, autocasts: bool, strategy: AccelDeepSpeedStrategy) -> None:
        super().__init__(precision, autocasts)
        self._strategy = strategy

    @override
    def convert_input(self, data: Any) -> Any:
        return super().convert_input(data) if self._strategy.engine is None else self.rounded(data)

    @override
    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._strategy.run.add_gradients(tensor, *args, **kwargs)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        result = closure()
        self._after_closure(model, optimizer)
        self._strategy.run.step(**kwargs)
        return result

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """DeepSpeed's step clips, to what it was told.

        Raises:
            ValueError: If another limit is asked for now.

        """
        told = self._strategy.run.clipping
        if (clip_val or 0.0) != told or (told and gradient_clip_algorithm == GradClipAlgorithmType.VALUE):
            raise clipped_otherwise(
                told,
                f"{clip_val} by {gradient_clip_algorithm}",
                "Say it with Trainer(gradient_clip_val=...) or gradient_clipping in the file.",
            )
