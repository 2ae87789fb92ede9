"""What the ranks of `test_accel_deepspeed` do, all in one job: DeepSpeed keeps its process groups as long as a process.

Models are float32, as DeepSpeed's master values are.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from models import Net, Regression, loader
from torch import Tensor, nn

STEPS, ACCUMULATE, CLIPPING = 20, 2, 0.3
BATCHES = 5  # an epoch: its third step has one batch only
STAGES = (0, 1, 2, 3)


class Float32(Regression):
    """Notes its losses and learning rates; SGD shows wrong scales of gradients, which Adam hides."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"optimizer": "SGD", **settings})
        self.net = Net(dtype=torch.float32)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data() -> Any:
    return loader(size=8 * BATCHES, dtype=torch.float32)


def trainer(strategy: Any, **arguments: Any) -> pl.Trainer:
    """A quiet Trainer, without `MeanOfShortWindows`: short windows count as Lightning counts them."""
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
        "max_steps": STEPS,
        "accumulate_grad_batches": ACCUMULATE,
        "gradient_clip_val": CLIPPING,
    }
    devices = 1 if strategy == "auto" else 2
    return pl.Trainer(accelerator="cpu", strategy=strategy, devices=devices, **{**quiet, **arguments})


def fitted(module: Float32, strategy: Any, **arguments: Any) -> dict[str, Any]:
    """Losses and what became of the model."""
    used = trainer(strategy, **arguments)
    used.fit(module, data())
    return {
        "losses": module.losses,
        "values": {name: value.detach().clone() for name, value in module.state_dict().items()},
        "steps": used.global_step,
    }


def import_quietly() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("deepspeed")
    # A minute's compilation, for what gloo does as well.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def everything() -> dict[str, Any]:
    from lightning_accel.strategies import AccelDeepSpeedStrategy

    import_quietly()
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[f"stage {stage}"] = fitted(Float32(), AccelDeepSpeedStrategy(stage=stage))
    return found
