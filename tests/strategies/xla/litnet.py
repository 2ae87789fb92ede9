"""A small model with what shards badly, its data, and how the tests of this folder train it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

WORDS, WIDTH, LENGTH, SAMPLES = 17, 30, 5, 16

# fp32 carries 24 bits: 6e-8 an operation. Twenty steps, whose sums are taken in another order, stay below a hundred
# times that in norm; a wrong factor or a lost gradient is larger by far.
FLOAT32 = 1e-5


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width + 3), nn.Linear(4 * width + 3, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class LitNet(pl.LightningModule):
    """Says of some words which one is next. One matrix is tied, one frozen, one module not used."""

    def __init__(self, manual: bool = False, schedule: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.schedule = schedule
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.dropout = nn.Dropout(dropout)
        self.accuracy = MulticlassAccuracy(WORDS, average="micro")

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embed(tokens) * self.scale + self.shift)
        for block in self.blocks:
            x = block(x)
        return self.head(self.frozen(x))[:, -1]

    def loss(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        logits = self(batch[0])
        return nn.functional.cross_entropy(logits.float(), batch[1]), logits

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        loss, _ = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            self.manual_backward(loss / 2)
            if index % 2:
                self.clip_gradients(optimizer, 0.3, "norm")
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        loss, logits = self.loss(batch)
        self.accuracy(logits, batch[1])
        self.log("val_loss", loss)
        self.log("val_accuracy", self.accuracy)

    def test_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.log("test_loss", self.loss(batch)[0])

    def predict_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        # eps of the gradients' own order: the update of what hardly matters should not hang on its sign.
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=3e-3, eps=1e-5)
        if not self.schedule:
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def litnet(**settings: Any) -> LitNet:
    torch.manual_seed(0)
    return LitNet(**settings)


def loader(batches: int, *, size: int = SAMPLES, seed: int = 1, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (batches * SAMPLES, LENGTH), generator=generator)
    targets = torch.randint(WORDS, (batches * SAMPLES,), generator=generator)
    return DataLoader(TensorDataset(tokens, targets), batch_size=size, shuffle=shuffle)


class Losses(pl.Callback):
    """Keeps the loss of each batch, where it is."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.kept.append(outputs["loss"])

    @property
    def values(self) -> list[float]:
        return [float(loss) for loss in self.kept]


class SaveAfter(pl.Callback):
    """Writes a checkpoint after so many optimizer steps of all: within an epoch, which a fit that has ended is not."""

    def __init__(self, steps: int, path: Path) -> None:
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)


def trainer(strategy: Any = "auto", folder: Path | None = None, **settings: Any) -> pl.Trainer:
    on_xla = strategy != "auto" or settings.get("accelerator") == "accel_xla"
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": folder is not None,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **({} if on_xla else {"accelerator": "cpu", "devices": 1}),
    }
    return pl.Trainer(strategy=strategy, **{**quiet, **settings})


def values(module: nn.Module) -> Tensor:
    """All parameters, one after the other."""
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}, "the model comes home"
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


def difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Of all parameters, in norm, relative."""
    return float((values(ours) - values(theirs)).norm() / values(theirs).norm())


def leave_group() -> None:
    """End the process group that a strategy of ranks has left: metrics would be summed over it."""
    if dist.is_initialized():
        dist.destroy_process_group()
