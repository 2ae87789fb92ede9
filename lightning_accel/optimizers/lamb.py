"""LAMB: Adam's direction for each tensor, with a step as long as the tensor's values allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_accel.core import register_by_tensor
from lightning_accel.core.clipping import norms_of
from lightning_accel.optimizers.batched import BatchedOptimizer
from lightning_accel.optimizers.batches import gradients_of, require_common, require_number


class Lamb(BatchedOptimizer):
    r"""LAMB, for large batches, with the parameter names, defaults and formulas of DeepSpeed's.

    With the gradient :math:`g`, moments :math:`m` and :math:`v` that start at zero, and the values :math:`x` of one
    tensor, step :math:`t` is

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \frac{m}{\sqrt{v} + \epsilon} + \lambda x, \qquad
        r = \operatorname{clamp}\!\left(\frac{\lVert x \rVert}{\lVert u \rVert}, r_{min}, r_{max}\right) \\
        x &\leftarrow x - \eta \, \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \, r \, u

    with 2-norms over the whole tensor, and :math:`r = 1` where one of them is zero. Under an engine that shards
    optimizer state each rank updates its share of whole tensors, so the norms are those of a single process.

    "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (You et al., 2020) corrects the bias of
    :math:`m` and :math:`v` before it takes the norm. DeepSpeed, and so this class, corrects the length of the step
    instead: by the factor behind :math:`\eta`, which with the default ``betas`` is 0.32 in the first step and nears 1
    after some thousands. ``bias_correction=False`` leaves it out, which brings the early steps near the paper's, as the
    trust ratio :math:`r` makes up for the rest.

    State of a parameter: ``step`` (0-dim, fp32, on the CPU), ``exp_avg`` and ``exp_avg_sq`` (shape and dtype of the
    parameter).

    Args:
        params: Parameters, or dicts of parameter groups, each with settings of its own if wanted. Real numbers only.
        lr: The learning rate :math:`\eta`.
        bias_correction: Correct the length of the step for moments that started at zero.
        betas: Decay of the two moments, at least 0 and below 1.
        eps: :math:`\epsilon`, added to the denominator.
        eps_inside_sqrt: Take :math:`\sqrt{v + \epsilon}` for the denominator.
        weight_decay: :math:`\lambda`. It counts for the trust ratio.
        max_grad_norm: 0. As with DeepSpeed's engine, gradients are not clipped here: an optimizer with a share of the
            parameters does not know the norm of all gradients. Use ``gradient_clip_val=`` of the Trainer, or clip
            before the step.
        max_coeff: Upper limit :math:`r_{max}` of the trust ratio.
        min_coeff: Lower limit :math:`r_{min}` of the trust ratio.

    Raises:
        ValueError: If a setting of any group is out of range.

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        settings = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, settings)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: If a setting is out of range.

        """
        settings = {**self.defaults, **param_group}
        require_common(settings)
        for name in ("eps", "max_coeff", "min_coeff"):
            require_number(name, settings[name])
        if settings["min_coeff"] > settings["max_coeff"]:
            raise ValueError(
                f"Expected min_coeff to be at most max_coeff, got {settings['min_coeff']!r} and"
                f" {settings['max_coeff']!r}."
            )
        if settings["max_grad_norm"]:
            raise ValueError(
                f"Expected max_grad_norm=0, got {settings['max_grad_norm']!r}: an optimizer that has a share of the"
                " parameters cannot know the norm of all gradients. Use the Trainer's gradient_clip_val, or clip before"
                " the step."
            )
        super().add_param_group(param_group)

    @override
    def _kind(self, parameter: Tensor) -> float:
        """How many steps a parameter has had."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return float(state["step"])

    @override
    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters that have had equally many steps."""
        count = self._kind(parameters[0]) + 1
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            state["step"] += 1
        gradients = gradients_of(parameters)
        exp_avgs = [state["exp_avg"] for state in states]
        exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)
        if group["eps_inside_sqrt"]:
            denominators = torch._foreach_add(exp_avg_sqs, group["eps"])
            torch._foreach_sqrt_(denominators)
        else:
            denominators = torch._foreach_sqrt(exp_avg_sqs)
            torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(exp_avgs, denominators)
        del denominators
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        length = float(group["lr"])
        if group["bias_correction"]:
            length *= math.sqrt(1 - beta2**count) / (1 - beta1**count)
        ratios = _trust_ratios(parameters, updates, group["min_coeff"], group["max_coeff"])
        torch._foreach_mul_(updates, (ratios * -length).unbind())
        torch._foreach_add_(parameters, updates)


def _trust_ratios(parameters: Sequence[Tensor], updates: Sequence[Tensor], low: float, high: float) -> Tensor:
    """How long the step of each tensor may be, in fp32 or wider: no value leaves the device."""
    values, changes = _norms(parameters), _norms(updates)
    ratios = (values / changes).clamp(low, high)
    return ratios.where((values != 0) & (changes != 0), 1.0)


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].device.type == "cpu":
        return torch.stack(norms_of(tensors, 2.0))  # torch's own are not precise for large tensors there
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wide))


register_by_tensor(Lamb)
