"""Local SGD: ranks train by themselves for some steps, and average their parameters then.

::

    steps       1   2   3   4   5   6   7   8
    gradients   .   .   .   .   .   .   .   .      never sent
    parameters              x               x      averaged over ranks, local_sgd_steps=4

[Note: an engine for each rank]
Within the block the model is trained by an engine whose only rank is this one; afterwards by one of all ranks again.
Optimizer state is averaged then, too (and of step counters the highest is taken): ranks whose momentum differs would
not stay the same with the same gradients.

Stich, "Local SGD Converges Fast and Communicates Little", 2019.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.core.placement import Rest
from lightning_accel.plugins.precision import engine_optimizer

if TYPE_CHECKING:
    from lightning_accel.manual.accelerator import Accelerator


class LocalSGD:
    """A block in which a prepared model is trained by each rank alone. All ranks enter, step and leave together.

    Args:
        accelerator: What has prepared the model and its optimizers. Its strategy must be ``"ddp"``.
        model: The model, as ``prepare`` has returned it.
        local_sgd_steps: After how many optimizer steps parameters are averaged.
        enabled: If False, nothing is different.

    Raises:
        ValueError: If the strategy shards something, ``mixed_precision`` is ``"fp16"`` (each rank would have a loss
            scale of its own), or ``local_sgd_steps`` is not positive.

    Example::

        with LocalSGD(accelerator, model, local_sgd_steps=8) as local_sgd:
            for x, y in loader:
                accelerator.backward(loss_function(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()

    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, local_sgd_steps: int, enabled: bool = True) -> None:
        if local_sgd_steps < 1:
            raise ValueError(f"Expected local_sgd_steps of 1 or more, got {local_sgd_steps}.")
        strategy = accelerator._strategy
        if enabled and strategy.row.optimizer_state is Rest.SHARDED:
            raise ValueError(
                f"Expected strategy='ddp' for LocalSGD, where every rank has a model of its own, got"
                f" {strategy.row.name!r}."
            )
        if enabled and strategy.grad_scaler is not None:
            raise ValueError(
                "Expected a precision without loss scaling for LocalSGD, as each rank would have a scale of its own."
                " Use mixed_precision='bf16'."
            )
        self.enabled = enabled and accelerator.use_distributed
        """Whether it does anything: there must be several processes."""
        self.num_steps = 0
        """Optimizer steps so far."""
        self.local_sgd_steps = local_sgd_steps
        """After how many of them parameters are averaged."""
        self._accelerator = accelerator
        self._module = accelerator._engine_of(model)

    def __enter__(self) -> LocalSGD:
        if self.enabled:
            self._adopt(self._released(), dist.new_group([dist.get_rank()], use_local_synchronization=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled or kind is not None:  # others may not come
            return
        self._average()
        optimizers = self._released()
        for optimizer in optimizers:
            added = engine_optimizer(optimizer)
            assert added is not None
            added.give_up()
            self._average_state(optimizer)
        self._adopt(optimizers, None)

    def step(self) -> None:
        """Call after each ``optimizer.step()``. While gradients accumulate nothing happens."""
        if not self.enabled or not self._accelerator.sync_gradients:
            return
        self.num_steps += 1
        if self.num_steps % self.local_sgd_steps == 0:
            self._average()

    def _released(self) -> list[Optimizer]:
        """The optimizers of the present engine, which is closed."""
        optimizers = [added.optimizer for added in self._module.engine.optimizers]
        self._module.engine.close()
        return optimizers

    def _adopt(self, optimizers: list[Optimizer], group: dist.ProcessGroup | None) -> None:
        """Have another engine train the model."""
        strategy, device = self._accelerator._strategy, self._accelerator.device
        engine = strategy._options.start(self._module.module, strategy.row, device, strategy.precision, group)
        for optimizer in optimizers:
            engine.add_optimizer(optimizer)
        engine.build()
        self._module.engine = engine
        strategy._engines.append(weakref.ref(engine))

    def _average(self) -> None:
        engine = self._module.engine
        with engine.changing():
            for unit in engine.units:
                _mean(unit.memory.mine)

    def _average_state(self, optimizer: Optimizer) -> None:
        """Have all ranks' optimizers be in the same state: tensors are averaged, of counters the highest is taken.

        A parameter may have state on some ranks only, if it has had no gradient on the others: these get a copy first.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [_told(optimizer.state.get(parameter, {})) for parameter in parameters])
        for parameter, told in zip(parameters, zip(*everyone, strict=True), strict=True):
            names = sorted(set().union(*told))
            lacking = [rank for rank, entries in enumerate(told) if len(entries) < len(names)]
            if len(lacking) == len(told):  # none has all of it, or there is none
                optimizer.state.pop(parameter, None)
                continue
            if lacking:
                source = next(rank for rank in range(len(told)) if rank not in lacking)
                box = [optimizer.state.get(parameter)]
                dist.broadcast_object_list(box, src=source, device=self._accelerator.device)
                if dist.get_rank() in lacking:
                    copied = box[0] or {}
                    optimizer.state[parameter] = {name: _beside(parameter, value) for name, value in copied.items()}
                told = tuple(told[source] if rank in lacking else entries for rank, entries in enumerate(told))
            state = optimizer.state[parameter]
            for name in names:
                value = state[name]
                counts = [entries[name] for entries in told]
                if counts[0] is None:
                    if value.is_floating_point():  # of the parameter's shape or not: Adafactor has rows and columns
                        _mean(value)
                elif isinstance(value, Tensor):
                    value.fill_(max(counts))
                else:
                    state[name] = max(counts)


def _told(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter has for state: numbers; None for tensors of elements."""
    told: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            told[name] = value.item() if name == "step" and value.numel() == 1 else None
        elif isinstance(value, (int, float)):
            told[name] = value
    return told


def _beside(parameter: Tensor, value: Any) -> Any:
    """A value that came from another rank, on this rank's device if it was on that rank's."""
    return value.to(parameter.device) if isinstance(value, Tensor) and value.device.type != "cpu" else value


@torch.no_grad()
def _mean(tensor: Tensor) -> None:
    """The mean over all ranks, in place."""
    dist.all_reduce(tensor)
    tensor.div_(dist.get_world_size())
