"""A ``PipelineModule`` under DeepSpeed's own engine: a call of it with a batch is a whole step.

[Note: a call is a step]
DeepSpeed's pipeline runs the forward and backward of several micro-batches at once and steps the optimizer itself. So
the batch that a LightningModule calls its ``PipelineModule`` with is cut into ``gradient_accumulation_steps``
micro-batches, and the call does all that Lightning would do with the loss that it returns: backward, clipping and
the optimizer's step. Lightning goes through these, and counts steps and steps schedules as ever; nothing is left to do.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from typing_extensions import override

from lightning_accel.strategies.deepspeed_run import RunningEngine


def find_pipeline(module: nn.Module, stage: int) -> Any:
    """The ``PipelineModule`` within a module; None if there is none.

    Args:
        module: A LightningModule, say.
        stage: The ZeRO stage that is to be trained with.

    Raises:
        ValueError: If there are several, parameters outside of it, or a stage that pipelines do not go with.

    """
    pipe = sys.modules.get("deepspeed.runtime.pipe.module")
    found = [part for part in module.modules() if pipe is not None and isinstance(part, pipe.PipelineModule)]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"Expected one PipelineModule in {type(module).__name__}, got {len(found)}.")
    inside = set(found[0].parameters())
    outside = [name for name, parameter in module.named_parameters() if parameter not in inside]
    if outside:
        raise ValueError(
            f"Expected all parameters of {type(module).__name__} within its PipelineModule, got {outside[0]} outside:"
            " DeepSpeed's engine trains the pipeline only. Make it one of the pipeline's layers."
        )
    if stage > 1:
        raise ValueError(
            f"Expected ZeRO stage 0 or 1 with a PipelineModule, got {stage}: DeepSpeed's pipelines do not divide"
            " gradients. Say AccelDeepSpeedStrategy(stage=1)."
        )
    return found[0]


class PipelineRun(RunningEngine):
    """DeepSpeed's pipeline engine. See [Note: a call is a step].

    Args:
        pipe: The ``PipelineModule``.
        optimizer: See ``RunningEngine``, likewise the next two.
        told: DeepSpeed's configuration; what it accumulates are the micro-batches of a batch.
        device: What is trained on.

    """

    def __init__(self, pipe: Any, optimizer: Optimizer | None, told: Mapping[str, Any], device: Any) -> None:
        super().__init__(pipe, pipe, optimizer, told, device)
        for parameter in pipe.parameters():
            # Without ZeRO, DeepSpeed would clip by the norm of the first stage's gradients. What is tied counts once.
            parameter.model_parallel = not getattr(parameter, "ds_pipe_replicated", False)
        self._micro_batches: int = told["gradient_accumulation_steps"]
        self._shapes: list[Any] = []  # of the last micro-batch
        self._has_stepped = False
        vars(pipe)["forward"] = self._called

    def _called(self, batch: Any) -> Any:
        """What a call of the ``PipelineModule`` does.

        Args:
            batch: Inputs and labels, each a tensor or several, of (samples, …).

        Returns:
            The mean loss, in training of this replica's samples, in evaluation of all; the same on each of its stages.

        Raises:
            ValueError: If the batch cannot be cut.
            RuntimeError: If it is the second call of a training step.

        """
        if self.is_at_work:  # it is the engine that calls, for this rank's layers
            return type(self.module).forward(self.module, batch)
        if not torch.is_grad_enabled():
            cut = self._cut(batch, self._micro_batches if _samples(batch) % self._micro_batches == 0 else 1)
            with self._at_work():
                return self.engine.eval_batch(iter(cut), num_micro_batches=len(cut)).squeeze()
        if self._has_stepped:
            raise RuntimeError(
                "Expected training_step to call its PipelineModule once, got another call: each is a whole step."
            )
        samples = _samples(batch)
        if samples % self._micro_batches:
            raise ValueError(
                f"Expected batches that can be cut into {self._micro_batches} micro-batches"
                f" (gradient_accumulation_steps), got one of {samples} samples. Give the DataLoader a multiple as"
                " batch_size, and drop_last=True."
            )
        cut = self._cut(batch, self._micro_batches)
        with self._at_work():
            self.engine.train_batch(iter(cut))
        self._has_stepped = True
        loss: Tensor = self.engine.dp_group_loss.detach().clone()
        return loss

    def _cut(self, batch: Any, count: int) -> list[Any]:
        leaves, spec = tree_flatten(batch)
        parts = zip(*(leaf.chunk(count) for leaf in leaves), strict=True)
        cut = [tree_unflatten(list(part), spec) for part in parts]
        shapes = [leaf.shape for leaf in tree_leaves(cut[0])]
        if self._shapes and shapes != self._shapes:
            self.engine.reset_activation_shape()  # stages have told each other what to expect, once
        self._shapes = shapes
        return cut

    @override
    def add_gradients(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Nothing: the call that returned the loss has done it."""

    @override
    def step(self, **kwargs: Any) -> None:
        """Nothing but to allow for another call.

        Raises:
            RuntimeError: If there was none.

        """
        if not self._has_stepped:
            raise RuntimeError("Expected training_step to call its PipelineModule with the batch, got no call of it.")
        self._has_stepped = False
        self.step_was_skipped = not self.engine.was_step_applied()

    @override
    def end(self, *, abandon: bool) -> None:
        vars(self.module).pop("forward", None)
        super().end(abandon=abandon)


def _samples(batch: Any) -> int:
    """How many samples are in a batch.

    Raises:
        ValueError: If it is not tensors of as many samples.

    """
    leaves = tree_leaves(batch)
    counts = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in leaves}
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or len(counts) != 1 or None in counts:
        raise ValueError(
            "Expected a PipelineModule to be called with (inputs, labels), each a tensor or several, of (samples, ...),"
            f" got {type(batch).__name__} of {[tuple(getattr(leaf, 'shape', ())) for leaf in leaves]}."
        )
    return len(leaves[0])
