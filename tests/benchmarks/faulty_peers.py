"""Peers that do what no peer should, for the tests of the benchmark's honesty."""

import time

from torch import Tensor

from benchmarks.peers.torch_ddp import TorchDDP


class Slow(TorchDDP):
    """Sleeps in every step."""

    def backward(self, loss: Tensor) -> None:
        time.sleep(0.2)
        super().backward(loss)


class Wrong(TorchDDP):
    """Doubles every gradient."""

    def backward(self, loss: Tensor) -> None:
        super().backward(2 * loss)


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
