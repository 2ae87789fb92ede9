"""The GPT of train_lm.py in a loop of one's own, with Lightning Fabric.

The same model, data and command line; only who calls whom differs.

    python examples/fabric_loop.py --strategy accel_zero1
    python examples/fabric_loop.py --resume --max-steps 2000      # go on from the last checkpoint
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from common import (
    data_module,
    describe_memory,
    finish,
    label,
    language_model_parser,
    model_arguments,
    parse_language_model,
    sample_text,
    share_cores,
)
from gpt import GPT, adamw, next_token_loss, warmup_cosine
from learning_curve import LearningCurve
from lightning.fabric.strategies import STRATEGY_REGISTRY
from torch import Tensor, nn

import lightning_accel  # noqa: F401  registers the strategies

LAST = "last.ckpt"


def endless(loader: Any, taken: int) -> Iterator[Tensor]:
    """Batches of one epoch after the other.

    Args:
        loader: A data loader from ``fabric.setup_dataloaders``.
        taken: Batches that the run took before it was interrupted.
    """
    epochs, skip = divmod(taken, len(loader))
    for _ in range(epochs):
        next(iter(loader))  # Fabric shuffles by how often it was asked for an iterator
    while True:
        yield from itertools.islice(loader, skip, None)
        skip = 0


@torch.no_grad()
def validate(fabric: L.Fabric, model: nn.Module, loader: Any) -> float:
    """Mean loss over the validation batches of all ranks, in nats per token."""
    model.eval()
    losses = torch.stack([next_token_loss(model, batch) for batch in loader])
    model.train()
    return float(fabric.all_reduce(losses.mean(), reduce_op="mean"))


def train_step(
    fabric: L.Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor], clip: float
) -> Tensor:
    """One optimizer step on several micro-batches ``[batch_size, block_size + 1]``.

    Returns:
        The mean loss over the micro-batches and ranks, in nats per token.
    """
    losses = []
    for i, batch in enumerate(batches):
        # Only the last backward needs to exchange gradients.
        with fabric.no_backward_sync(model, enabled=i < len(batches) - 1):
            loss = next_token_loss(model, batch) / len(batches)
            fabric.backward(loss)
        losses.append(loss.detach())
    if clip:
        # Under float16 the gradients may overflow: the scaler, not an error, deals with that.
        fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
    optimizer.step()
    optimizer.zero_grad()
    return fabric.all_reduce(torch.stack(losses).sum(), reduce_op="mean")


def train(fabric: L.Fabric, args: argparse.Namespace) -> None:
    """Train, validate and save until ``--max-steps``; every rank runs this."""
    share_cores(args.devices)
    fabric.seed_everything(args.seed, verbose=False)
    data = data_module(args)
    with fabric.rank_zero_first(local=True):
        data.prepare_data()
    data.setup("fit")
    train_loader, val_loader = fabric.setup_dataloaders(data.train_dataloader(), data.val_dataloader())

    gpt = GPT(**model_arguments(args))
    title = label(args, gpt)
    model, optimizer = fabric.setup(gpt, adamw(gpt, args.lr, args.weight_decay))
    scheduler = warmup_cosine(optimizer, args.warmup, args.max_steps)
    curve = LearningCurve()
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "curve": curve,
        "step": 0,
        "hyper_parameters": model_arguments(args),
    }
    if args.resume:
        fabric.load(args.resume, state)
        fabric.print(f"resumed at step {state['step']}")
    if state["step"] >= args.max_steps:
        fabric.print(f"the checkpoint is at step {state['step']} already: raise --max-steps to train on")
        return
    if not args.resume:
        curve.validated(0, validate(fabric, model, val_loader))

    batches = endless(train_loader, taken=state["step"] * args.accumulate)
    mark = time.perf_counter()
    for step in range(state["step"] + 1, args.max_steps + 1):
        micro_batches = list(itertools.islice(batches, args.accumulate))
        loss = float(train_step(fabric, model, optimizer, micro_batches, args.clip))
        now = time.perf_counter()
        tokens = sum(batch[:, 1:].numel() for batch in micro_batches) * fabric.world_size
        speed = curve.trained(step, tokens, now - mark, scheduler.get_last_lr()[0], loss)
        mark = now
        scheduler.step()
        if step % args.val_every == 0 or step == args.max_steps:
            val_loss = validate(fabric, model, val_loader)
            curve.validated(step, val_loss)
            fabric.print(f"step {step}: loss {loss:.4f}, val_loss {val_loss:.4f}, {speed:,.0f} tokens/s")
            state["step"] = step
            fabric.save(args.out / LAST, state)
            mark = time.perf_counter()

    details = [
        describe_memory(engine.report(), fabric.all_gather) for engine in getattr(fabric.strategy, "engines", [])
    ]
    if args.generate:
        details.append(sample_text(model, data, args.generate, fabric.device))
    if fabric.is_global_zero:
        print(finish(curve, title, args.out, details))


def main() -> None:
    """Read the command line and train."""
    parser = language_model_parser(
        "Train a small GPT on the source of Python's standard library, in a Lightning Fabric loop.",
        STRATEGY_REGISTRY.available_strategies(),
        "runs/fabric_loop",
    )
    args = parse_language_model(parser, LAST)
    share_cores(args.devices)
    fabric = L.Fabric(
        strategy=args.strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        precision=args.precision,
    )
    fabric.launch(train, args)


if __name__ == "__main__":
    main()
