"""The text that the examples train on: what is cut, in which order it comes, and where it goes on."""

import importlib
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler


@pytest.fixture
def stdlib_text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    return importlib.import_module("stdlib_text")


def test_windows_predict_every_token_once(stdlib_text: ModuleType) -> None:
    windows = stdlib_text.Windows(np.arange(12, dtype=np.uint8), block_size=4)

    assert [window.tolist() for window in windows] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert windows[0].dtype == torch.int64


def test_a_limit_spreads_the_windows_over_the_text(stdlib_text: ModuleType) -> None:
    windows = stdlib_text.Windows(np.arange(81), block_size=4, limit=4)

    assert [window[0].item() for window in windows] == [0, 20, 40, 60]


def test_too_little_text_says_how_much_is_needed(stdlib_text: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"Expected at least 5 tokens .* got 4"):
        stdlib_text.Windows(np.arange(4), block_size=4)


@pytest.mark.parametrize("epoch", [0, 1])
def test_one_rank_reads_what_two_ranks_read_together(
    stdlib_text: ModuleType, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    windows = stdlib_text.Windows(np.arange(101), block_size=5)
    alone = stdlib_text.EpochShuffle(windows)
    ranks: list[DistributedSampler] = [DistributedSampler(windows, 2, rank, seed=7) for rank in range(2)]
    for sampler in (alone, *ranks):
        sampler.set_epoch(epoch)

    assert list(alone) == list(itertools.chain.from_iterable(zip(*ranks, strict=True)))


def test_both_tokenizers_give_the_text_back(stdlib_text: ModuleType, tmp_path: Path) -> None:
    text = "def größe(x: int) -> str:\n    return f'{x} m²'\n"
    for kind, size in (("byte", 256), ("bpe", 300)):
        data = stdlib_text.StdlibText(tmp_path, kind, size)
        data.tokenizer = stdlib_text.train_bpe([text], size) if kind == "bpe" else None
        tokens = data.encode(text)

        assert tokens.shape[0] == 1
        assert int(tokens.max()) < size
        assert data.decode(tokens) == text
