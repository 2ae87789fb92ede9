"""The network of cnn.py as a LightningModule, under the same strategies.

python examples/accelerate_style/lit_cnn.py --strategy accel_zero2 --devices 2
"""

import argparse

import lightning as L
import torch
from digits import make_net, split_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import lightning_accel  # noqa: F401  registers the strategies


class LitDigits(L.LightningModule):
    """What cnn.py does by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=50, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    """Read the command line, train, validate after each epoch."""
    parser = argparse.ArgumentParser(description="Classify handwritten digits under any Lightning strategy.")
    parser.add_argument("--strategy", default="accel_ddp", help="any of Lightning's, or accel_…")
    parser.add_argument("--devices", type=int, default=2, help="ranks")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training images")
    args = parser.parse_args()
    torch.manual_seed(0)
    train, val = split_digits()
    trainer = L.Trainer(
        strategy=args.strategy,
        accelerator="cpu",
        devices=args.devices,
        max_epochs=args.epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(LitDigits(), DataLoader(train, batch_size=16, shuffle=True), DataLoader(val, batch_size=64))
    if trainer.is_global_zero:
        print(f"accuracy {trainer.callback_metrics['accuracy']:.4f}")


if __name__ == "__main__":
    main()
