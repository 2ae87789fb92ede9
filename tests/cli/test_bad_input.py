"""Commands that are given nonsense: status and message. One cell of each is run as a user runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launched import accel

from lightning_accel.cli.main import main

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
    (folder / "nonsense.py").write_text(MODELS)
    return folder


# Bad input of accel env is in test_commands_as_processes.py.
AS_PROCESSES = [
    ("launch nowhere.py", 1, "nowhere.py"),
    ("config --defualt", 2, "--defualt"),
    ("test --num_processes 1", 2, "--num_processes"),
    ("plan nonsense.py:nothing", 1, "nothing"),
    ("convert nowhere.ckpt out.ckpt", 1, "nowhere.ckpt"),
    ("inspect text.ckpt", 1, "text.ckpt"),
    ("bench --nonsense", 2, "--nonsense"),
]
HERE = [
    ("convert text.ckpt out.safetensors", 1, "text.ckpt"),
    ("convert empty out.ckpt", 1, "empty"),
    ("convert text.ckpt out --to nonsense", 2, "nonsense"),
    ("inspect cut.safetensors", 1, "cut.safetensors"),
    ("plan nonsense.py:number", 1, "number"),
    ("plan nonsense.py:model --memory much --batch 2x2", 1, "much"),
    ("plan nonsense.py:model --row zero9 --batch 2x2", 1, "zero9"),
    ("plan nonsense.py:model --precision half --batch 2x2", 1, "half"),
    ("plan nonsense.py:model --batch 2xtwo", 1, "2xtwo"),
    ("plan nonsense.py:model --ranks 0 --batch 2x2", 1, "at least one rank, got 0"),
]


def require_refused(folder: Path, before: list[Path], outcome: tuple[int, str, str], status: int, said: str) -> None:
    """A command that is refused says why in some lines, and leaves nothing."""
    code, out, err = outcome
    assert code == status, err
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= MOST_LINES
    assert out == ""
    assert there(folder) == before


def there(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"]


@pytest.mark.matrix
@pytest.mark.parametrize(("command", "status", "said"), AS_PROCESSES)
def test_bad_input(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, status: int, said: str) -> None:
    monkeypatch.chdir(folder)
    before = there(folder)
    done = accel(*command.split())
    require_refused(folder, before, (done.returncode, done.stdout, done.stderr), status, said)


@pytest.mark.parametrize(("command", "status", "said"), HERE)
def test_bad_input_in_this_process(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: str,
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["accel", *command.split()])
    before = there(folder)
    with pytest.raises(SystemExit) as end:
        main()
    require_refused(folder, before, (int(end.value.code or 0), *capfd.readouterr()), status, said)
