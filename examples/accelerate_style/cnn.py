"""Classify digits with a plain loop: accumulation, mixed precision, validation accuracy, save and resume.

But for the line that imports ``Accelerator`` this is a script for Hugging Face Accelerate; see lit_cnn.py for the same
as a LightningModule.

    python examples/accelerate_style/cnn.py --cpu
    accel launch --cpu --num_processes 2 --strategy zero2 examples/accelerate_style/cnn.py
    accel launch --cpu --num_processes 2 examples/accelerate_style/cnn.py --epochs 8 --resume
"""

import argparse
from pathlib import Path

import torch
from digits import make_net, split_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_accel import Accelerator


def main() -> None:
    """Read the command line, train, validate after each epoch."""
    parser = argparse.ArgumentParser(description="Classify handwritten digits with a plain PyTorch loop.")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=16, help="images per rank and micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per optimizer step")
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: as `accel launch` was told")
    parser.add_argument("--cpu", action="store_true", default=None, help="use no GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/cnn"), help="where to save")
    parser.add_argument("--resume", action="store_true", help="go on from what --out has")
    args = parser.parse_args()

    accelerator = Accelerator(
        cpu=args.cpu, mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate
    )
    torch.manual_seed(0)
    train, val = split_digits()
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.7)
    train_loader = DataLoader(train, batch_size=args.batch_size, shuffle=True)
    val_loader = DataLoader(val, batch_size=64)
    model, optimizer, train_loader, val_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, val_loader, scheduler
    )

    first = 0
    if args.resume:
        accelerator.load_state(args.out / "state")
        first = int((args.out / "epoch.txt").read_text()) + 1
    for epoch in range(first, args.epochs):
        model.train()
        for images, labels in train_loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

        model.eval()
        right = seen = 0
        for images, labels in val_loader:
            with torch.no_grad():
                found = model(images).argmax(1)
            # Of all ranks, without those samples that fill up the last batch.
            found, labels = accelerator.gather_for_metrics((found, labels))
            right += int((found == labels).sum())
            seen += len(labels)
        accelerator.print(f"epoch {epoch}: accuracy {right / seen:.4f} of {seen} images")

        accelerator.save_state(args.out / "state")
        if accelerator.is_main_process:
            (args.out / "epoch.txt").write_text(str(epoch))
    accelerator.end_training()


if __name__ == "__main__":
    main()
