"""Peers that do what no peer should, for the tests of the benchmark's honesty."""

import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.torch_ddp import TorchDDP


class Slow(TorchDDP):
    """Sleeps in every step, and cannot save on rank 1."""

    def backward(self, loss: Tensor) -> None:
        time.sleep(0.2)
        super().backward(loss)

    def save(self, path: Path) -> None:
        if self.config.rank == 1:
            raise OSError("no place left")
        super().save(path)


class Wrong(TorchDDP):
    """Doubles every gradient, and leaves the optimizer as it is when it loads."""

    def backward(self, loss: Tensor) -> None:
        super().backward(2 * loss)

    def load_file(self, file: Path) -> None:
        self.module.load_state_dict(torch.load(file, weights_only=True)["model"])


class Crashing(TorchDDP):
    """Rank 1 raises once it has trained 16 steps, which is in the second round."""

    def backward(self, loss: Tensor) -> None:
        if self.config.rank == 1 and len(self.history[-1]) == 16:
            raise ArithmeticError("another step\nis too much")
        super().backward(loss)


class Hanging(TorchDDP):
    """Rank 1 stops in the second round, too, and rank 0 waits for it."""

    def backward(self, loss: Tensor) -> None:
        if self.config.rank == 1 and len(self.history[-1]) == 16:
            time.sleep(3600)
        super().backward(loss)
