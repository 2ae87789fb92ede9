"""What the loss scale's rules need on XLA devices.

A number that a program computes with is sent there, or it would be part of the program, and each new scale another one
to compile. The verdict is read on the host, which says whether there is a step: what is recorded by then is cut off
first, or the devices would compute it for the verdict, and once more for the gradients.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.core.grad_scaler import Surroundings
from lightning_accel.core.xla.engine import XLAEngine


class OnDevices(Surroundings):
    """Has a ``GradScaler`` scale what engines train: ``scaler.surroundings = OnDevices(engine)``.

    Args:
        engines: The engines; a scaler does not keep them.

    """

    def __init__(self, *engines: XLAEngine) -> None:
        self._engines = weakref.WeakSet(engines)

    @override
    def number(self, value: float, device: torch.device) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device="cpu").to(device)

    @override
    def read(self, verdict: Tensor) -> bool:
        """The value; this waits for the devices."""
        import torch_xla

        torch_xla.sync()  # as an engine's cut(): it is one recording for all engines
        return bool(verdict)

    @override
    def backwards(self, optimizer: Optimizer) -> int | None:
        return next((engine.backwards for engine in self._engines if optimizer in engine.optimizers), None)
