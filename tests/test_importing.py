"""What importing this package costs and does, and actions after imports in general."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

import lightning_accel
from lightning_accel.importing import after_import


def test_after_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seen_once.py").write_text("import seen_first\nvalue = seen_first.value\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    seen: list[object] = []
    for _ in range(2):
        after_import("seen_once", lambda module: seen.append(module.value))
    with pytest.raises(ModuleNotFoundError, match="seen_first"):
        __import__("seen_once")
    assert seen == []
    (tmp_path / "seen_first.py").write_text("value = 7\n")
    module = __import__("seen_once")
    assert seen == [7, 7]
    assert isinstance(module.__loader__, SourceFileLoader)
    assert module.__spec__.loader is module.__loader__
    after_import("seen_once", lambda module: seen.append(module))
    assert seen == [7, 7, module]
    assert sys.meta_path == before
    for name in ("seen_once", "seen_first"):
        monkeypatch.delitem(sys.modules, name)


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_the_package_and_its_command_are_imported_without_torch() -> None:
    run(
        "import sys, lightning_accel, lightning_accel.cli.main, lightning_accel.launching.bootstrap\n"
        "assert {'torch', 'lightning', 'numpy'}.isdisjoint(sys.modules)\n"
        "assert 'zero2' in lightning_accel.core.ROWS\n"
        "assert 'torch' not in sys.modules\n"
        "assert lightning_accel.data.joined"
    )


def test_every_name_is_there() -> None:
    for module in (lightning_accel, lightning_accel.core):
        assert module.__all__
        for name in module.__all__:
            assert name == "ROWS" or getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Acelerator'"):
        _ = lightning_accel.Acelerator


@pytest.mark.matrix
@pytest.mark.parametrize(
    "first", ["lightning.fabric", "lightning_accel.plugins.precision", "lightning_accel.callbacks", "lightning_accel"]
)
def test_strategies_are_registered_whatever_is_imported_first(first: str) -> None:
    run(
        f"import {first}, lightning_accel, lightning\n"
        "from lightning.fabric.strategies import STRATEGY_REGISTRY\n"
        "from lightning.pytorch.strategies import StrategyRegistry\n"
        "assert 'accel_fsdp' in STRATEGY_REGISTRY\n"
        "assert 'accel_fsdp' in StrategyRegistry\n"
        "assert lightning_accel.AccelPrecision.__module__.startswith('lightning_accel.plugins')"
    )
