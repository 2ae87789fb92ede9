"""A Trainer under accel_xla on several hosts: what host 0 must not do alone, and shares that must be equal.

[Note: read by all or by none]
A value that Python asks for is computed first, by a program over all devices, and waits for them. Lightning has host 0
alone show progress, and print what an evaluation has found. So the progress bar shows no metrics there, and what an
evaluation has found is computed on all hosts before it is printed.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler

from lightning_accel.core.xla.hosts import hosts
from lightning_accel.strategies.signals import AgreedSignals


class AmongHosts:
    """What a fit or another stage needs where there are several hosts, until ``end``; see the note of this file.

    Args:
        trainer: Whose stage it is, before it has registered its handlers of signals.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        # Its messages are tensors, and gloo knows no XLA device.
        self._signals = AgreedSignals(trainer, torch.device("cpu"))
        self._bar: Any = trainer.progress_bar_callback
        if self._bar is not None:
            vars(self._bar)["get_metrics"] = _no_metrics

    def end(self) -> None:
        """Have everything as it was."""
        self._signals.remove()
        if self._bar is not None:
            vars(self._bar).pop("get_metrics", None)


def _no_metrics(*args: Any) -> dict[str, Any]:
    return {}


def require_equal_shares(loader: Any) -> None:
    """Raise if Lightning has divided the samples of a loader over hosts and left some with one more: in prediction.

    Raises:
        ValueError: Says how many samples and hosts there are.

    """
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    count = hosts().count
    if isinstance(sampler, UnrepeatedDistributedSampler) and sampler.total_size % count:
        raise ValueError(
            f"Expected a number of samples to predict that {count} hosts divide evenly, got {sampler.total_size}: one"
            " program runs on all of them, and each needs as many samples. Leave some out, or repeat some."
        )


def no_transfer() -> TypeError:
    """The error for a batch that the user's own hook moves, where there are several hosts."""
    return TypeError(
        "Expected no transfer_batch_to_device of the model's or the data's own on several hosts: what it moves is whole"
        " on every device, and another batch on each host. Leave the hook out, and change batches in"
        " on_before_batch_transfer or on_after_batch_transfer."
    )
