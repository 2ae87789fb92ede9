"""What the schedules have in common.

[Note: which step has which rate]
torch and DeepSpeed count alike but start elsewhere. When the k-th optimizer step runs, k from 1 on, a torch scheduler
has ``last_epoch = k - 1``, and DeepSpeed's has ``last_batch_iteration = k - 2``: its constructor sets a first learning
rate without counting, and what its first ``step`` sets is for the second optimizer step. The schedules here give the
k-th optimizer step what it has under DeepSpeed, so that each is a function of ``last_epoch``, and what is of interest
is how DeepSpeed's constructors set the first one: the warm-ups have their lowest rate twice (the cosine one: 0 first,
whatever its lowest ratio), and one cycle its lowest momentum first, before it goes on from the highest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override


class Schedule(LRScheduler):
    """A schedule in which the learning rate of each optimizer step depends on its number alone.

    Args:
        optimizer: Whose learning rates are set, at once and in each ``step``, which follows the optimizer's.
        last_batch_iteration: How many steps were taken already, less one. What resumes by ``load_state_dict``, as
            Lightning does, leaves it at -1. Else the optimizer's groups must have their ``initial_lr``, as they do once
            its state is loaded.

    """

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int) -> None:
        super().__init__(optimizer, last_batch_iteration)

    def rates(self, done: int) -> list[float | Tensor]:
        """The learning rate of each parameter group after so many optimizer steps.

        Args:
            done: The number of optimizer steps, at least 0.

        """
        raise NotImplementedError

    @override
    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group for the next optimizer step."""
        return self.rates(self.last_epoch)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another schedule was.

        Args:
            state_dict: What ``state_dict`` has returned: with the settings, as torch's schedulers have it. Or that of
                DeepSpeed's schedule, which tells no settings: those of this one stay. Learning rates are part of the
                optimizer's state.

        """
        if "last_batch_iteration" in state_dict:
            done = int(state_dict["last_batch_iteration"]) + 1
            counts = {"last_epoch": done, "_step_count": done + 1}
            super().load_state_dict({**counts, "_last_lr": self.rates(done)})
        else:
            super().load_state_dict(dict(state_dict))


def by_group(optimizer: Optimizer, name: str, value: float | Sequence[float]) -> list[float]:
    """A setting for each parameter group.

    Args:
        optimizer: Whose groups.
        name: Of the setting.
        value: A number for all groups, or one for each.

    Raises:
        TypeError: If ``optimizer`` is none of torch's.
        ValueError: If there are more or fewer numbers than groups, or one is negative or not finite.

    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    groups = len(optimizer.param_groups)
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [value] * groups
    if len(values) != groups:
        raise ValueError(
            f"Expected {name} to be a number, or one for each of the {groups} parameter groups, got {len(values)}."
        )
    for each in values:
        require_number(name, each)
    return [float(each) for each in values]


def require_number(name: str, value: Any, low: float = 0.0, *, whole: bool = False, signed: bool = False) -> None:
    """Raise unless a setting is a finite number in its range.

    Args:
        name: Of the setting.
        value: Of the setting.
        low: The least that it may be.
        whole: It must be an integer.
        signed: It may be negative as well.

    Raises:
        ValueError: If it is not.

    """
    kinds = (int,) if whole else (int, float, Tensor)
    if isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value) and (signed or value >= low):
        return
    limit = "" if signed else f" of at least {low:g}"
    raise ValueError(f"Expected {name} to be {'an integer' if whole else 'a number'}{limit}, got {value!r}.")
