"""Lion: steps of one length for all elements, in the direction of a momentum's signs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_accel.core import register_elementwise
from lightning_accel.optimizers.batched import BatchedOptimizer
from lightning_accel.optimizers.batches import gradients_of, require_common


class Lion(BatchedOptimizer):
    r"""Lion, with the parameter names and defaults of DeepSpeed's.

    With the gradient :math:`g` and a momentum :math:`m` that starts at zero, a step is

    .. math::
        x &\leftarrow x - \eta \left( \operatorname{sign}(\beta_1 m + (1 - \beta_1) g) + \lambda x \right) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g

    as in "Symbolic Discovery of Optimization Algorithms" (Chen et al., 2023), with half of Adam's state. Where
    momentum and gradient are zero, nothing but the decay moves a value, as :math:`\operatorname{sign}(0) = 0`.
    (DeepSpeed's CUDA kernel has a step of :math:`+\eta` there.)

    The paper's defaults are ``lr=1e-4`` and ``betas=(0.9, 0.99)``. It takes 3 to 10 times smaller learning rates than
    for AdamW, and as much larger ``weight_decay``.

    State of a parameter: ``exp_avg`` (shape and dtype of the parameter).

    Args:
        params: Parameters, or dicts of parameter groups, each with settings of its own if wanted. Real numbers only.
        lr: The learning rate :math:`\eta`.
        betas: What remains of the momentum in the step's direction, and in the momentum itself; at least 0, below 1.
        weight_decay: :math:`\lambda`, apart from gradient and momentum.

    Raises:
        ValueError: If a setting of any group is out of range.

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: If a setting is out of range.

        """
        require_common({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @override
    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        exp_avgs = []
        for parameter in parameters:
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            exp_avgs.append(state["exp_avg"])
        gradients = gradients_of(parameters)
        lr = float(group["lr"])
        beta1, beta2 = group["betas"]
        directions = torch._foreach_lerp(exp_avgs, gradients, 1 - beta1)
        torch._foreach_sign_(directions)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, directions, alpha=-lr)
        torch._foreach_lerp_(exp_avgs, gradients, 1 - beta2)


register_elementwise(Lion)
