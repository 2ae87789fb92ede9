"""``accel convert``, ``inspect`` and ``plan`` that are given nonsense, as a user runs them: status and message."""

from __future__ import annotations

from pathlib import Path

import pytest
from launched import accel

pytestmark = pytest.mark.matrix

MOST_LINES = 20

MODELS = """
import torch

def number():
    return 3

def model():
    return torch.nn.Linear(2, 2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "text.ckpt").write_text("no checkpoint")
    (folder / "cut.safetensors").write_bytes(b"\xff" * 12)
    (folder / "models.py").write_text(MODELS)
    return folder


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("convert nowhere.ckpt out.ckpt", 1, "nowhere.ckpt"),
        ("convert text.ckpt out.safetensors", 1, "text.ckpt"),
        ("convert empty out.ckpt", 1, "empty"),
        ("convert text.ckpt out --to nonsense", 2, "nonsense"),
        ("inspect text.ckpt", 1, "text.ckpt"),
        ("inspect cut.safetensors", 1, "cut.safetensors"),
        ("plan models.py:nothing", 1, "nothing"),
        ("plan models.py:number", 1, "number"),
        ("plan models.py:model --memory much --batch 2x2", 1, "much"),
        ("plan models.py:model --row zero9 --batch 2x2", 1, "zero9"),
        ("plan models.py:model --precision half --batch 2x2", 1, "half"),
        ("plan models.py:model --batch 2xtwo", 1, "2xtwo"),
        ("plan models.py:model --ranks 0 --batch 2x2", 1, "at least one rank, got 0"),
    ],
)
def test_bad_input(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, status: int, said: str) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    done = accel(*command.split())
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= MOST_LINES
    assert done.stdout == ""
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before
