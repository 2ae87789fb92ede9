"""Hugging Face's own Trainer on several ranks, started by ``accel launch``: digits once more, from their pixels.

It needs Accelerate, which does the distributed training here (DDP): what ``accel launch`` gives it are the ranks. Their
number, the precision and the rest are said as for every script.

    pip install accelerate
    accel launch --cpu --num_processes 2 examples/accelerate_style/hf_trainer.py
"""

import argparse
from pathlib import Path

import numpy as np
from digits import make_net, split_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer, TrainingArguments


class Classifier(nn.Module):
    """The network with its loss inside, as Hugging Face's Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The mean loss, and logits ``[batch, 10]``."""
        logits = self.net(images)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rows:
    """A dataset of pairs as one of dictionaries."""

    def __init__(self, pairs: object) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.pairs[index]  # type: ignore[index]
        return {"images": image, "labels": label}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of digits that were recognised."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, -1) == prediction.label_ids))}


def main() -> None:
    """Read the command line, train, validate."""
    parser = argparse.ArgumentParser(description="Classify handwritten digits with Hugging Face's Trainer.")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training images")
    parser.add_argument("--out", type=Path, default=Path("runs/hf_trainer"), help="where to write")
    args = parser.parse_args()
    train, val = split_digits()
    arguments = TrainingArguments(
        output_dir=str(args.out),
        use_cpu=True,
        ddp_backend="gloo",
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=3e-3,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(
        Classifier(), arguments, train_dataset=Rows(train), eval_dataset=Rows(val), compute_metrics=accuracy
    )
    trainer.train()
    found = trainer.evaluate()
    if trainer.is_world_process_zero():
        print(f"accuracy {found['eval_accuracy']:.4f} on {trainer.args.world_size} ranks")
    trainer.accelerator.end_training()  # leaves torch's process group: a rank that ends within it may crash


if __name__ == "__main__":
    main()
