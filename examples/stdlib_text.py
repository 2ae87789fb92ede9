"""Real text that every machine with Python has: the source of Python's own standard library."""

import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
VALIDATION_EVERY = 20  # every 20th file is held out for validation


def source_files() -> list[Path]:
    """The standard library's ``.py`` files, sorted by path, without its tests and without installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if not EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts)
    )


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of exactly the bytes plus the most frequent merges, ``vocab_size`` tokens in all."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Windows(Dataset):
    """Windows of ``block_size + 1`` tokens: ``block_size`` to read and the same, one later, to predict.

    Args:
        tokens: Token numbers, 1-D, any integer type, at least ``block_size + 1`` of them.
        block_size: Tokens to predict in a window. Neighbours share one token, and no token is predicted twice.
        limit: At most this many windows, spread evenly over the text; all of them if ``None``.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, limit: int | None = None) -> None:
        count = (len(tokens) - 1) // block_size
        if count < 1:
            raise ValueError(f"Expected at least {block_size + 1} tokens (--block-size plus one), got {len(tokens)}")
        self.tokens = tokens
        self.block_size = block_size
        kept = count if limit is None else min(limit, count)
        self.starts = np.arange(kept) * count // kept * block_size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = self.starts[index]
        return torch.from_numpy(self.tokens[start : start + self.block_size + 1].astype(np.int64))


class EpochShuffle(RandomSampler):
    """A new order every epoch: the one that DistributedSampler, which replaces it where there are several ranks, uses.

    So one rank reads the same windows as many ranks do together, and a restarted run reads those it would have read.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))  # left there by seed_everything
        generator = torch.Generator().manual_seed(seed + self.epoch)
        return iter(torch.randperm(len(self.data_source), generator=generator).tolist())


class StdlibText(L.LightningDataModule):
    """The standard library as windows of tokens, split by file into training and validation.

    Args:
        cache: Folder for the token arrays; a sub-folder is made for each tokenizer.
        tokenizer: ``"byte"`` or ``"bpe"``.
        vocab_size: Size of the BPE's vocabulary; 256 for bytes.
        block_size: Tokens to predict per window.
        batch_size: Windows per batch and rank.
        validation_tokens: Validate on about this many tokens, spread evenly over the held-out files.
    """

    def __init__(
        self,
        cache: str | Path,
        tokenizer: str = "byte",
        vocab_size: int = 256,
        block_size: int = 128,
        batch_size: int = 8,
        validation_tokens: int = 16384,
    ) -> None:
        super().__init__()
        self.kind = tokenizer
        self.vocab_size = vocab_size
        self.folder = Path(cache) / f"python{platform.python_version()}-{tokenizer}-{vocab_size}"
        self.block_size = block_size
        self.batch_size = batch_size
        self.validation_windows = max(1, validation_tokens // block_size)
        self.tokenizer: Tokenizer | None = None
        self.train_tokens = self.val_tokens = np.zeros(0, dtype=np.uint16)

    def prepare_data(self) -> None:
        """Tokenise the files and write the arrays, unless it was done before. Lightning calls it on one rank only."""
        if self.folder.exists():
            return
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in source_files()]
        held_out = texts[VALIDATION_EVERY // 2 :: VALIDATION_EVERY]
        kept = [text for i, text in enumerate(texts) if i % VALIDATION_EVERY != VALIDATION_EVERY // 2]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that an interrupted run leaves nothing that looks finished.
        work = Path(tempfile.mkdtemp(dir=self.folder.parent))
        try:
            tokenizer = train_bpe(kept, self.vocab_size) if self.kind == "bpe" else None
            if tokenizer is not None:
                tokenizer.save(str(work / "tokenizer.json"))
            np.save(work / "train.npy", encode(kept, tokenizer))
            np.save(work / "val.npy", encode(held_out, tokenizer))
            os.replace(work, self.folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def setup(self, stage: str) -> None:
        """Open the arrays that :meth:`prepare_data` wrote; memory-mapped, so that ranks of a machine share them."""
        self.train_tokens = np.load(self.folder / "train.npy", mmap_mode="r")
        self.val_tokens = np.load(self.folder / "val.npy", mmap_mode="r")
        if self.kind == "bpe":
            self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def train_dataloader(self) -> DataLoader:
        """Shuffled windows, int64 ``[batch_size, block_size + 1]``."""
        windows = Windows(self.train_tokens, self.block_size)
        return DataLoader(windows, batch_size=self.batch_size, sampler=EpochShuffle(windows), drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """The validation windows in their order, int64 ``[<= batch_size, block_size + 1]``."""
        windows = Windows(self.val_tokens, self.block_size, limit=self.validation_windows)
        return DataLoader(windows, batch_size=self.batch_size)

    def encode(self, text: str) -> Tensor:
        """Token numbers of a text, int64 ``[1, time]``."""
        return torch.from_numpy(encode([text], self.tokenizer).astype(np.int64))[None]

    def decode(self, tokens: Tensor) -> str:
        """The text of token numbers ``[1, time]``; bytes that are not UTF-8 show as a replacement character."""
        numbers = tokens[0].tolist()
        if self.tokenizer is not None:
            return self.tokenizer.decode(numbers)
        return bytes(numbers).decode("utf-8", errors="replace")


def encode(texts: Sequence[str], tokenizer: Tokenizer | None) -> np.ndarray:
    """Token numbers of all texts in a row, 1-D: UTF-8 bytes as uint8, or a BPE's numbers as uint16."""
    if tokenizer is None:
        return np.frombuffer("".join(texts).encode(), dtype=np.uint8)
    return np.concatenate([np.array(part.ids, dtype=np.uint16) for part in tokenizer.encode_batch(list(texts))])
