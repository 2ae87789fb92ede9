"""Classify scikit-learn's handwritten digits with a small CNN: BatchNorm, torchmetrics, early stopping, many ranks.

The digits come with scikit-learn: 1797 grey images of 8 x 8 pixels.

    python examples/train_digits.py
    python examples/train_digits.py --strategy accel_ddp --max-epochs 10 --min-accuracy 0.95
"""

import argparse
import sys

import lightning as L
import torch
from common import add_machine_arguments, not_negative, positive, share_cores
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_accel  # noqa: F401  registers the strategies


class Digits(L.LightningDataModule):
    """Images float32 ``[batch, 1, 8, 8]`` in 0..1 and labels int64 ``[batch]`` in 0..9; 20 % each to validate and test.

    Args:
        batch_size: Images per batch and rank.
        seed: Of the split.
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.parts: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        """Split the images, with every digit equally frequent in each part."""
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        indices = range(len(labels))
        train, rest = train_test_split(indices, test_size=0.4, stratify=labels, random_state=self.seed)
        val, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=self.seed)
        targets = torch.tensor(labels)
        self.parts = {
            name: TensorDataset(images[part], targets[part])
            for name, part in (("train", train), ("val", val), ("test", test))
        }

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["train"], batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["val"], batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["test"], batch_size=self.batch_size)


class DigitClassifier(L.LightningModule):
    """Three convolutions with BatchNorm and a linear layer.

    Args:
        width: Channels of the first convolution.
        lr: Peak learning rate of AdamW, under a one-cycle schedule.
    """

    def __init__(self, width: int = 32, lr: float = 5e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[nn.Module] = []
        channels = 1
        for out, stride in ((width, 1), (2 * width, 2), (2 * width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels * 4, 10))
        # Metrics keep counts per rank and add them up over the ranks when an epoch ends.
        self.val_accuracy = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[batch, 10]`` of images ``[batch, 1, 8, 8]``."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.val_accuracy(self(images), labels)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams["lr"], steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    """Read the command line, train, test."""
    parser = argparse.ArgumentParser(
        description="Classify handwritten digits under any Lightning strategy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_machine_arguments(parser, StrategyRegistry.available_strategies(), "runs/train_digits")
    group = parser.add_argument_group("training")
    group.add_argument("--max-epochs", type=positive, default=20, help="passes over the training images")
    group.add_argument("--patience", type=positive, default=6, help="stop after this many epochs without a gain")
    group.add_argument("--batch-size", type=positive, default=32, help="images per rank")
    group.add_argument("--lr", type=not_negative, default=5e-3, help="peak learning rate")
    group.add_argument("--min-accuracy", type=not_negative, help="exit with status 1 below this, of 1")
    args = parser.parse_args()
    if args.min_accuracy is not None and args.min_accuracy > 1:
        parser.error(f"--min-accuracy is a part of 1, got {args.min_accuracy}")

    share_cores(args.devices)
    L.seed_everything(args.seed, verbose=False)
    best = ModelCheckpoint(
        args.out / "checkpoints", "best", monitor="val_accuracy", mode="max", enable_version_counter=False
    )
    trainer = L.Trainer(
        strategy=args.strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        precision=args.precision,
        max_epochs=args.max_epochs,
        callbacks=[
            best,
            EarlyStopping("val_accuracy", mode="max", patience=args.patience),
            TQDMProgressBar(refresh_rate=10),
        ],
        logger=False,
        enable_model_summary=False,
    )
    data = Digits(args.batch_size, args.seed)
    model = DigitClassifier(lr=args.lr)
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, ckpt_path="best", verbose=False)
    accuracy = result["test_accuracy"]
    if trainer.is_global_zero:
        print(f"test accuracy {accuracy:.4f} after {trainer.current_epoch} epochs with {args.strategy}")
    # Every rank has the same accuracy, and leaves with the same status.
    if args.min_accuracy is not None and accuracy < args.min_accuracy:
        sys.exit(1)


if __name__ == "__main__":
    main()
