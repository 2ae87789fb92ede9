"""What is planned: a model, a batch, and how the one becomes a loss of the other.

[Note: copies without memory]
Each simulation trains a copy of the user's model whose tensors have shapes and dtypes, but no values and no memory:
torch's fake tensors. ``copy.deepcopy`` makes it, told beforehand what to put in the place of each parameter and buffer;
so tied parameters stay tied, and the user's model is left as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from lightning_accel.planning.precision import Precision
from lightning_accel.planning.stand_in import StandInTrainer

OptimizerMaker = Callable[[Any], Optimizer]
"""Makes an optimizer of parameters: a class, or ``lambda parameters: ...``."""


@dataclass(frozen=True)
class Subject:
    """A model to plan for."""

    module: nn.Module
    """Its tensors may have values, or be on the meta device."""
    batch: Any
    make_optimizer: OptimizerMaker | None
    """None: the LightningModule's own ``configure_optimizers``."""

    @staticmethod
    def of(model: nn.Module | Callable[[], Any], batch: Any, optimizer: OptimizerMaker | None) -> Subject:
        """What a user has given.

        Args:
            model: A module, or a callable without arguments that makes one, or ``(module, batch)``. It is called with
                the meta device as torch's default device.
            batch: What a training step gets.
            optimizer: Makes the optimizer.

        Raises:
            ValueError: If there is no batch, or no optimizer, or the model cannot be made on the meta device.
            TypeError: If it is no model.

        """
        if isinstance(model, nn.Module):
            made: Any = model
        elif callable(model):
            made = make_on_meta(model)
        else:
            raise TypeError(f"Expected a module, or a callable that makes one, got {type(model).__name__}.")
        if isinstance(made, tuple) and len(made) == 2:
            if batch is not None:
                raise ValueError(
                    "Expected one batch, got one as an argument and another from the callable that makes the model."
                )
            made, batch = made
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"Expected a callable that returns a module, or (module, batch), got {type(made).__name__}."
            )
        if batch is None:
            raise ValueError(
                "Expected a batch, as what forward keeps for backward depends on it, got none. Give batch=..., such as"
                " (torch.empty(8, 32, device='meta'),): shapes and dtypes count only."
            )
        if optimizer is None and not callable(getattr(made, "configure_optimizers", None)):
            raise ValueError(
                f"Expected an optimizer for {type(made).__name__}, which has no configure_optimizers(), got none. Give"
                " optimizer=..., such as torch.optim.AdamW or lambda parameters: torch.optim.SGD(parameters, lr=0.1)."
            )
        if not any(p.requires_grad for p in made.parameters()):
            raise ValueError(f"Expected {type(made).__name__} to have parameters to train, got none.")
        return Subject(made, batch, optimizer)

    @property
    def is_lightning(self) -> bool:
        """Whether ``training_step`` is what makes a loss of a batch."""
        return callable(getattr(self.module, "training_step", None))

    def copied(self, mode: FakeTensorMode, precision: Precision, ranks: int = 1) -> nn.Module:
        """A copy of the module without memory. See [Note: copies without memory]."""
        module = self.module
        memo: dict[int, Any] = {}
        for parameter in module.parameters():
            memo[id(parameter)] = _fake_parameter(mode, parameter, precision)
        for buffer in module.buffers():
            memo[id(buffer)] = _fake(mode, buffer, precision)
        trainer = getattr(module, "_trainer", None)
        if trainer is not None:
            memo[id(trainer)] = None
        copied = copy.deepcopy(module, memo)
        for part in copied.modules():
            if "_trainer" in vars(part):
                vars(part)["_trainer"] = StandInTrainer(ranks)
            # Tensors that are neither: masks, tables.
            for name, value in list(vars(part).items()):
                if isinstance(value, Tensor) and value.is_meta:
                    setattr(part, name, _fake(mode, value, precision))
        return copied

    def batch_copied(self, mode: FakeTensorMode, precision: Precision) -> Any:
        """The batch without memory."""
        batch = dict(self.batch) if isinstance(self.batch, Mapping) else self.batch
        return tree_map_only(Tensor, lambda tensor: _fake(mode, tensor, precision), batch)

    def outputs(self, module: nn.Module, batch: Any) -> Any:
        """What a copy of the module makes of a batch."""
        if self.is_lightning:
            return module.training_step(batch, 0)  # type: ignore[operator]
        if isinstance(batch, Mapping):
            return module(**batch)
        return module(*batch) if isinstance(batch, list | tuple) else module(batch)

    def loss(self, output: Any) -> Tensor:
        """The loss in what a module has made of a batch.

        Raises:
            ValueError: If there is none.

        """
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            what = "training_step" if self.is_lightning else type(self.module).__name__
            raise ValueError(
                f"Expected {what} to return a loss (a scalar with a graph), or an output that has one as .loss, got"
                f" {_described(output)}. Give a batch with labels, or a module whose forward returns the loss."
            )
        return loss

    def optimizers(self, module: nn.Module) -> list[Optimizer]:
        """The optimizers of a copy of the module.

        Raises:
            ValueError: If there are none, or they are stepped by hand.

        """
        if self.make_optimizer is not None:
            return [self.make_optimizer([p for p in module.parameters() if p.requires_grad])]
        if not getattr(module, "automatic_optimization", True):
            raise ValueError(
                f"Expected automatic optimization, but {type(module).__name__} steps its optimizers by itself: plan for"
                " one of its parts, with optimizer=..."
            )
        try:
            configured = module.configure_optimizers()  # type: ignore[operator]
        except AttributeError as error:  # of the Trainer that is not there
            raise ValueError(f"Expected configure_optimizers() to need no Trainer, but {error}") from error
        found = [one for one in _flat(configured) if isinstance(one, Optimizer)]
        if not found:
            raise ValueError(
                f"Expected {type(module).__name__}.configure_optimizers() to return an optimizer, got none. Give"
                " optimizer=..."
            )
        return found


def make_on_meta(factory: Callable[[], Any]) -> Any:
    """What a callable makes, with the meta device as torch's default.

    Raises:
        ValueError: If that cannot be done there.

    """
    try:
        with torch.device("meta"):
            return factory()
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"Expected {getattr(factory, '__qualname__', factory)} to make its model on the meta device, where tensors"
            f" have no values, but it needs some: {str(error).splitlines()[0]} Give the model itself instead of what"
            " makes it."
        ) from error


def _flat(configured: Any) -> list[Any]:
    """All that ``configure_optimizers`` may return optimizers in."""
    if isinstance(configured, Mapping):
        return [configured.get("optimizer")]
    if isinstance(configured, Sequence):
        return [one for member in configured for one in _flat(member)]
    return [configured]


def _fake(mode: FakeTensorMode, tensor: Tensor, precision: Precision) -> Tensor:
    dtype = precision.kept(tensor.dtype)
    with mode:
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"Expected dense tensors, got one of layout {tensor.layout} and shape {tuple(tensor.shape)}."
            )
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")


def _fake_parameter(mode: FakeTensorMode, parameter: nn.Parameter, precision: Precision) -> nn.Parameter:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(
            "Expected initialised parameters, but some are lazy and have no shape yet. Run one batch through the model"
            " first."
        )
    with mode:
        made = nn.Parameter(_fake(mode, parameter, precision), requires_grad=parameter.requires_grad)
    if not isinstance(parameter, FakeTensor):
        vars(made).update(vars(parameter))
    return made


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}" + " without a graph" * (not output.requires_grad)
    return f"a {type(output).__name__}"
