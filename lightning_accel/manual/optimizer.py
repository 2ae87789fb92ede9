"""Optimizers as ``Accelerator.prepare`` returns them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.wrappers import _FabricOptimizer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.core.optimizer import EngineOptimizer
from lightning_accel.manual.accumulation import Accumulation
from lightning_accel.plugins.precision import engine_optimizer
from lightning_accel.strategies.fabric import AccelFabricStrategy

if TYPE_CHECKING:
    from lightning_accel.manual.deepspeed import LoopFile


class PreparedOptimizer(_FabricOptimizer):
    """An optimizer that steps at the end of an accumulation window only. ``isinstance`` sees the user's class.

    Args:
        optimizer: The user's, which an engine has.
        strategy: Fabric's.
        accumulation: Where the loop is.
        file: A DeepSpeed file, whose clipping is done before steps.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        strategy: AccelFabricStrategy,
        accumulation: Accumulation,
        file: LoopFile | None = None,
    ) -> None:
        super().__init__(optimizer, strategy)
        self._file = file
        self.was_clipped = False
        """Whether the loop itself has clipped the gradients of the next step."""
        self._strategy: AccelFabricStrategy = strategy
        self._accumulation = accumulation
        self._settled: int | None = None  # the window whose gradients are multiplied already
        self._stepped: int | None = None  # the window that was stepped with last
        self._asked: int | None = None  # the window whose gradients are to be dropped, once it is over
        self.step_was_skipped = False
        """Whether the gradient scaler has skipped the last step, because gradients were not finite."""

    @property
    def added(self) -> EngineOptimizer:
        """The engine's side of it."""
        added = engine_optimizer(self._optimizer)
        assert added is not None
        return added

    @property
    def has_stepped(self) -> bool:
        """Whether ``step`` was called at the end of this window, which may have been skipped for the loss scale."""
        return self._stepped == self._accumulation.window

    def enter_window(self) -> None:
        """Drop the gradients of a window that is over without a step, if ``zero_grad`` was called in it."""
        if self._asked is not None and self._accumulation.is_over(self._asked):
            self.drop()

    def drop(self) -> None:
        """Drop gradients, and what is known of their window."""
        self._settled = self._stepped = self._asked = None
        self.was_clipped = False
        self._optimizer.zero_grad()

    def settle(self) -> None:
        """Have the gradients be a mean over the micro-batches that are in them. See [Note: short windows]."""
        accumulation = self._accumulation
        if accumulation.correction == 1.0 or self._settled == accumulation.window:
            return
        self._settled = accumulation.window
        added = self.added
        if not added.window.weighted:  # weights of losses make a mean by themselves
            added.gradients.multiply(accumulation.correction)

    def unscale(self) -> None:
        """Divide gradients by the loss scale, if there is one; they are a mean over their micro-batches then."""
        self.settle()
        self._strategy.precision.unscale_gradients(self._optimizer)

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step, if this micro-batch closes its window; otherwise nothing happens.

        Returns:
            What the closure returns; None if nothing happened or the scaler has skipped the step.

        """
        if not self._accumulation.sync_gradients:
            return None
        self.settle()
        if self._file is not None:
            self._file.before_step(self, closure)
        scaler = self._strategy.grad_scaler
        before = 0 if scaler is None else scaler.skipped_steps
        output = super().step(closure)
        self.step_was_skipped = scaler is not None and scaler.skipped_steps > before
        self._settled, self._stepped, self._asked = None, self._accumulation.window, None
        self.was_clipped = False
        if self._file is not None:
            self._file.after_step(self)
        return output

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Drop gradients, unless more are to be added to them.

        It may stand before backward or after step: what a window has accumulated stays until it was stepped with, or is
        over. In a window that is left without a step, it is dropped when the next one begins.
        """
        accumulation = self._accumulation
        if accumulation.backwards == 0 or self.has_stepped or accumulation.steps == 1:
            self._optimizer.zero_grad(*args, **kwargs)
            self.was_clipped = False
        else:
            self._asked = accumulation.window
