"""Pairs of text that every machine with Python has: the standard library's functions and what their docstrings say."""

import ast
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from stdlib_text import source_files
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

HELD_OUT_EVERY = 5  # every 5th file is held out for validation
LONGEST = 32  # tokens of a text; the rest is cut off


class Texts(NamedTuple):
    """Texts as the model takes them, int64 ``[texts, tokens]``; the mask is 0 where a text is padded."""

    ids: Tensor
    mask: Tensor


class Batch(NamedTuple):
    """Pairs: ``calls[i]`` belongs to ``summaries[i]``; ``numbers`` int64 ``[pairs]`` say which pairs these are."""

    numbers: Tensor
    calls: Texts
    summaries: Texts


def pairs_in(path: Path) -> list[tuple[str, str]]:
    """A file's functions as ``("join(a, p)", "Join two or more pathname components…")``."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []  # a few files show how older Pythons were written
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            summary = (ast.get_docstring(node) or "").split("\n")[0]
            arguments = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
            if len(summary.split()) >= 4:
                found.append((f"{node.name}({', '.join(arguments)})", summary))
    return found


def split_pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs to train with and pairs of other files; no call and no summary occurs twice."""
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]]] = [], []
    seen: set[str] = set()
    for number, path in enumerate(source_files()):
        for call, summary in pairs_in(path):
            if call not in seen and summary not in seen:
                seen |= {call, summary}
                parts[number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append((call, summary))
    return parts


class Pairs(Dataset[tuple[int, str, str]]):
    """Numbered pairs."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> tuple[int, str, str]:
        return number, *self.pairs[number]


class Docstrings(L.LightningDataModule):
    """Functions and summaries, in tokens.

    Args:
        tokenizer: The model's.
        batch_size: Pairs per batch and rank.
        held_out: At most this many pairs to validate with, spread evenly over the held-out files.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, batch_size: int, held_out: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.held_out = held_out

    def setup(self, stage: str) -> None:
        """Read the standard library."""
        train, rest = split_pairs()
        kept = min(self.held_out, len(rest))
        self.train = Pairs(train)
        self.val = Pairs([rest[number * len(rest) // kept] for number in range(kept)])

    def collate(self, pairs: list[tuple[int, str, str]]) -> Batch:
        """Pairs as tensors, padded to the longest text."""
        numbers, *columns = zip(*pairs, strict=True)
        sides = []
        for texts in columns:
            found = self.tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
            sides.append(Texts(found["input_ids"], found["attention_mask"]))
        return Batch(torch.tensor(numbers), *sides)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size, collate_fn=self.collate)
