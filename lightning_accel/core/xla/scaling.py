"""What the loss scale's rules need on XLA devices.

A number that a program computes with is sent there, or it would be part of the program, and each new scale another one
to compile. The verdict is read on the host, which says whether there is a step: what is recorded by then is cut off
first, or the devices would compute it for the verdict, and once more for the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.core.grad_scaler import Surroundings
from lightning_accel.core.xla.engine import XLAEngine


class OnDevices(Surroundings):
    """Has a ``GradScaler`` scale what an engine trains: ``scaler.surroundings = OnDevices(engine)``.

    Args:
        engine: The engine.

    """

    def __init__(self, engine: XLAEngine) -> None:
        self._engine = engine

    @override
    def number(self, value: float, device: torch.device) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device="cpu").to(device)

    @override
    def read(self, verdict: Tensor) -> bool:
        """The value; this waits for the devices."""
        self._engine.cut()
        return bool(verdict)

    @override
    def backwards(self, optimizer: Optimizer) -> int | None:
        return self._engine.backwards
