"""What a LightningModule is told while it is planned, if it asks its Trainer."""

from __future__ import annotations

from typing import Any

STEPS = 1000
"""How long learning-rate schedules are told that training is: nothing that is planned depends on it."""


class StandInTrainer:
    """Stands in for the Trainer of a module that none trains. ``self.log`` does nothing with it.

    Args:
        ranks: How many there are.

    """

    def __init__(self, ranks: int) -> None:
        self.world_size = self.num_devices = ranks
        self.num_nodes = 1
        self.barebones = True  # what has self.log leave out everything
        self.training = self.is_global_zero = True
        self.sanity_checking = self.validating = self.testing = self.predicting = False
        self.estimated_stepping_batches = self.max_steps = self.num_training_batches = STEPS
        self.max_epochs = self.accumulate_grad_batches = 1
        self.global_step = self.current_epoch = self.global_rank = self.local_rank = 0
        self.log_every_n_steps = STEPS
        self.logger = self.datamodule = self.gradient_clip_val = None
        self.loggers: list[Any] = []
        self.callbacks: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"there is no trainer.{name} while a model is planned. Give optimizer=... if configure_optimizers asks for"
            " it; leave it out of training_step, or plan for the model within the LightningModule."
        )
