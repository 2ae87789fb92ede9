"""The axes of the benchmark: each value of one with each value of the others is a run, and a table, of its own."""

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, TypeVar

from benchmarks.config import PRECISIONS, Config
from benchmarks.models import MODELS

Value = TypeVar("Value")

_RECOMPUTE = {"off": False, "on": True}


def positive(text: str) -> int:
    """A number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def several(read: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """A reader of values with commas between them, each once."""

    def values(text: str) -> list[Value]:
        found = list(dict.fromkeys(read(part.strip()) for part in text.split(",") if part.strip()))
        if not found:
            raise argparse.ArgumentTypeError("expected at least one value, got none")
        return found

    values.__name__ = "list"  # argparse names it in its messages
    return values


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """A reader of one of some words."""

    def word(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {text}")
        return text

    return word


def add_arguments(add: Callable[..., Any]) -> None:
    """Add the options of all axes to a parser."""
    add("--model", type=several(one_of(list(MODELS))), metavar="A,B", help=f"out of {', '.join(MODELS)}")
    add("--precision", type=several(one_of(PRECISIONS)), metavar="A,B", help=f"out of {', '.join(PRECISIONS)}")
    add("--ranks", type=several(positive), default=[2], metavar="N,M", help="processes of each peer (default: 2)")
    add("--accumulate", type=several(positive), default=[1], metavar="N,M", help="micro-batches per step (default: 1)")
    add(
        "--recompute",
        type=several(one_of(list(_RECOMPUTE))),
        nargs="?",
        const=["on"],
        default=["off"],
        metavar="off,on",
        help="whether the model's blocks compute activations again in backward (default: off; without a value: on)",
    )


def configs(options: argparse.Namespace, **rest: Any) -> list[Config]:
    """One run for each combination of the values in `options`; `rest` is the same for all."""
    return [
        Config(
            model=model, precision=precision, ranks=ranks, accumulate=accumulate, recompute=_RECOMPUTE[again], **rest
        )
        for model, precision, ranks, accumulate, again in product(
            options.model, options.precision, options.ranks, options.accumulate, options.recompute
        )
    ]


def slug(config: Config) -> str:
    """A name of a run for its files."""
    parts = [config.model, config.precision, f"{config.ranks}ranks"]
    parts += [f"{config.accumulate}micro"] * (config.accumulate > 1) + ["recompute"] * config.recompute
    return "-".join(parts)
