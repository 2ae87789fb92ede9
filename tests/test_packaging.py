"""What is installed, under which names, and who may import whom."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")


def imports(file: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that `file`, a module of `package`, imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def packages_in(folder: Path, name: str) -> dict[str, Path]:
    """Import name and folder of every package at or below `folder`, which is imported as `name`."""
    inits = sorted(folder.rglob("__init__.py"))
    return {".".join([name, *init.parent.relative_to(folder).parts]): init.parent for init in inits}


def all_packages() -> dict[str, Path]:
    return {
        **packages_in(ROOT / "lightning_accel", "lightning_accel"),
        **packages_in(ROOT / "strategies", "lightning_accel.strategies"),
    }


def wrong_imports(layer: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    """`file:line imports name` for what the package `layer`, down to its last module, must not import."""
    folders = {name: folder for name, folder in all_packages().items() if within(name, (layer,))}
    assert folders, f"Expected the package {layer}, got {sorted(all_packages())}."
    return [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for package, folder in folders.items()
        for file in sorted(folder.glob("*.py"))
        for line, name in imports(file, package)
        if within(name, forbidden) and not within(name, allowed)
    ]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11's tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("name", "folder"), [("lightning_accel", "lightning_accel"), ("lightning_accel.strategies", "strategies")]
)
def test_package_is_imported_from_its_folder(name: str, folder: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == (ROOT / folder / "__init__.py").resolve()


def test_version_is_the_installed_one() -> None:
    assert importlib.import_module("lightning_accel").__version__ == importlib.metadata.version("lightning-accel")


def test_version_is_the_one_in_pyproject(pyproject: dict[str, Any]) -> None:
    assert importlib.metadata.version("lightning-accel") == pyproject["project"]["version"], "run `make venv` again"


def test_every_package_is_installed_and_nothing_else(pyproject: dict[str, Any]) -> None:
    """A wheel holds the packages that pyproject.toml names, so one that it forgets is missing only after a release."""
    assert sorted(pyproject["tool"]["setuptools"]["packages"]) == sorted(all_packages())


def test_type_information_is_installed() -> None:
    assert (ROOT / "lightning_accel" / "py.typed").is_file()


def test_core_knows_nothing_of_lightning() -> None:
    """Checked in the source: importing core runs lightning_accel/__init__.py, which does import Lightning."""
    wrong = wrong_imports("lightning_accel.core", (*LIGHTNING, "lightning_accel"), allowed=("lightning_accel.core",))
    assert wrong == []


def test_data_knows_core_alone() -> None:
    allowed = ("lightning_accel.core", "lightning_accel.data")
    assert wrong_imports("lightning_accel.data", (*LIGHTNING, "lightning_accel"), allowed=allowed) == []


def test_optimizers_know_core_alone() -> None:
    allowed = ("lightning_accel.core", "lightning_accel.optimizers")
    assert wrong_imports("lightning_accel.optimizers", (*LIGHTNING, "lightning_accel"), allowed=allowed) == []


def test_schedules_know_torch_alone() -> None:
    allowed = ("lightning_accel.schedules",)
    assert wrong_imports("lightning_accel.schedules", (*LIGHTNING, "lightning_accel"), allowed=allowed) == []


def test_plugins_know_nothing_of_strategies() -> None:
    assert wrong_imports("lightning_accel.plugins", ("lightning_accel.strategies", "lightning_accel.manual")) == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import lightning.pytorch as pl", "lightning.pytorch"),
        ("from lightning import Trainer", "lightning.Trainer"),
        ("def f():\n    import pytorch_lightning", "pytorch_lightning"),
        ("from .layout import Unit", "lightning_accel.core.layout.Unit"),
        ("from .. import manual", "lightning_accel.manual"),
        ("from ..strategies.ddp import DDP", "lightning_accel.strategies.ddp.DDP"),
    ],
)
def test_imports_are_found(tmp_path: Path, line: str, name: str) -> None:
    (tmp_path / "module.py").write_text(line)
    assert [found for _, found in imports(tmp_path / "module.py", "lightning_accel.core")] == [name]
