"""What the language-model examples share: the command line, threads, and what is printed at the end."""

import argparse
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from gpt import generate
from learning_curve import LearningCurve
from stdlib_text import StdlibText
from torch import Tensor, nn

from lightning_accel.core.checkpoint import load

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
PROMPT = "def "
MODEL_ARGUMENTS = ("vocab_size", "dim", "layers", "heads", "tie")


def positive(text: str) -> int:
    """Argparse type: a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """Argparse type: a whole number, zero or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number that is 0 or above, got {text!r}")
    return int(text)


def not_negative(text: str) -> float:
    """Argparse type: a finite number, zero or above."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number that is 0 or above, got {text!r}")
    return value


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Argparse type: one of many names, which the help need not all list."""
    known = sorted({"auto", *names})

    def strategy(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"unknown strategy {text!r}; choose from {', '.join(known)}")
        return text

    return strategy


def add_machine_arguments(parser: argparse.ArgumentParser, strategies: Iterable[str], out: str) -> None:
    """Add what every example takes: strategy, devices, precision, seed and output folder."""
    group = parser.add_argument_group("machine")
    group.add_argument("--strategy", type=one_of(strategies), default="accel_zero2", help="any registered strategy")
    group.add_argument("--accelerator", default="auto", help="cpu, cuda, ... or auto")
    group.add_argument("--devices", type=positive, default=2, help="ranks per node")
    group.add_argument("--num-nodes", type=positive, default=1, help="machines")
    group.add_argument("--precision", choices=PRECISIONS, default="32-true", help="number format")
    group.add_argument("--seed", type=count, default=0, help="of weights, data order and sampling")
    group.add_argument("--out", type=Path, default=Path(out), help="folder for everything that is written")


def language_model_parser(description: str, strategies: Iterable[str], out: str) -> argparse.ArgumentParser:
    """The command line of the language-model examples."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_machine_arguments(parser, strategies, out)

    group = parser.add_argument_group("data")
    group.add_argument(
        "--tokenizer", choices=("byte", "bpe"), default="byte", help="bytes, or a BPE learnt on the spot"
    )
    group.add_argument("--vocab-size", type=positive, default=2048, help="of the BPE; bytes are always 256")
    group.add_argument("--block-size", type=positive, default=128, help="tokens per window")
    group.add_argument("--batch-size", type=positive, default=8, help="windows per rank and micro-batch")
    group.add_argument("--validation-tokens", type=positive, default=16384, help="validate on about this many")

    group = parser.add_argument_group("model")
    group.add_argument("--dim", type=positive, default=128, help="width")
    group.add_argument("--layers", type=positive, default=4, help="depth")
    group.add_argument("--heads", type=positive, default=4, help="attention heads")
    group.add_argument("--tie", action="store_true", help="tie the output layer to the token embedding")

    group = parser.add_argument_group("training")
    group.add_argument("--max-steps", type=positive, default=600, help="optimizer steps, resumed ones included")
    group.add_argument("--val-every", type=positive, default=50, help="optimizer steps between validations")
    group.add_argument("--accumulate", type=positive, default=1, help="micro-batches per optimizer step")
    group.add_argument("--lr", type=not_negative, default=3e-3, help="peak learning rate")
    group.add_argument("--warmup", type=positive, default=20, help="steps until the peak")
    group.add_argument("--weight-decay", type=not_negative, default=0.1, help="of matrices")
    group.add_argument("--clip", type=not_negative, default=1.0, help="largest gradient norm; 0 does not clip")
    group.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="CHECKPOINT",
        help="go on from a checkpoint, or from the last one in --out",
    )
    group.add_argument("--generate", type=count, default=300, help="tokens to write at the end; 0 for none")
    return parser


def parse_language_model(parser: argparse.ArgumentParser, last: str) -> argparse.Namespace:
    """Parse and check the command line.

    Args:
        parser: From :func:`language_model_parser`.
        last: Where the script keeps its last checkpoint, relative to ``--out``.

    Returns:
        The arguments. ``resume`` is a path that exists, or ``None``; ``vocab_size`` fits the tokenizer.
    """
    args = parser.parse_args()
    if args.dim % (2 * args.heads):
        parser.error(f"--dim must be a multiple of twice --heads, got --dim {args.dim} and --heads {args.heads}")
    if args.tokenizer == "byte":
        args.vocab_size = 256
    elif not 256 < args.vocab_size <= 65536:
        parser.error(f"--vocab-size must be above 256 (the bytes) and at most 65536, got {args.vocab_size}")
    if args.resume is not None:
        args.resume = args.out / last if args.resume == "last" else Path(args.resume)
        if not args.resume.exists():
            parser.error(f"--resume: there is no checkpoint {args.resume}")
        check_same_model(parser, args)
    return args


def check_same_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a checkpoint of another model by name, before its tensors do not fit."""
    if args.resume.is_dir():
        checkpoint = load(args.resume)
    else:
        checkpoint = torch.load(args.resume, map_location="cpu", mmap=True, weights_only=True)
    saved = checkpoint.get("hyper_parameters", {})
    for name in MODEL_ARGUMENTS:
        if name in saved and saved[name] != getattr(args, name):
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {getattr(args, name)}, but {args.resume} has a model with {saved[name]}")


def share_cores(ranks: int) -> None:
    """Give each rank of this machine its part of the CPU cores.

    Args:
        ranks: Ranks on this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // ranks)
    # For processes that are spawned from this one, before they import torch.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What defines the model, from the command line."""
    return {name: getattr(args, name) for name in MODEL_ARGUMENTS}


def data_module(args: argparse.Namespace) -> StdlibText:
    """The text, as the command line asks for it."""
    cache = args.out / "data"
    return StdlibText(cache, args.tokenizer, args.vocab_size, args.block_size, args.batch_size, args.validation_tokens)


def label(args: argparse.Namespace, model: nn.Module) -> str:
    """What runs, in one line."""
    size = sum(parameter.numel() for parameter in model.parameters())
    ranks = args.devices * args.num_nodes
    return f"GPT, {size:,} parameters, {args.strategy}, {ranks} rank{'s' if ranks > 1 else ''}, {args.precision}"


def describe_memory(report: Any, all_gather: Callable[[Tensor], Tensor]) -> str:
    """The engine's report, and what each rank holds between steps. Collective: every rank must call it.

    Args:
        report: From ``engine.report()``.
        all_gather: Maps an int64 tensor ``[kinds]`` to ``[ranks, kinds]``.
    """
    kinds = list(report.at_rest)
    table = all_gather(torch.tensor([report.at_rest[kind] for kind in kinds])).reshape(-1, len(kinds))
    lines = [str(report)]
    for rank, sizes in enumerate(table.tolist()):
        parts = ", ".join(
            f"{kind.replace('_', ' ')} {size:,} B" for kind, size in zip(kinds, sizes, strict=True) if size
        )
        lines.append(f"rank {rank} holds {sum(sizes):,} B of model state: {parts}")
    return "\n".join(lines)


def sample_text(model: nn.Module, data: StdlibText, new_tokens: int, device: torch.device) -> str:
    """Text that the trained model writes.

    Collective: every rank must call it, though one prints. A strategy that shards the parameters gathers them in
    ``forward``, and the same seed makes every rank run it equally often.
    """
    model.eval()
    tokens = generate(model, data.encode(PROMPT).to(device), new_tokens, data.block_size)
    model.train()
    return f"sample {'-' * 73}\n{data.decode(tokens.cpu())}\n{'-' * 80}"


def finish(curve: LearningCurve, title: str, out: Path, details: Iterable[str]) -> str:
    """Write the learning curve and put together what is printed at the end. For rank 0."""
    curve.write_csv(out / "metrics.csv")
    curve.plot(out / "curve.png", title)
    lines = [
        "",
        title,
        curve.summary(),
        f"throughput {curve.speed:,.0f} tokens/s over all ranks, without validation and checkpoints",
        *details,
        f"wrote metrics.csv, curve.png and checkpoints to {out}",
    ]
    return "\n".join(lines)
