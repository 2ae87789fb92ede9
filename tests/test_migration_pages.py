"""docs/from-accelerate.md and docs/from-lightning-strategies.md: complete, and true in what they name."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)

from lightning_accel import Accelerator, AccelPrecision, strategies
from lightning_accel.cli.main import app
from lightning_accel.core import GradScaler, PowerSGD
from lightning_accel.core.loss_scale import ScaleRule
from lightning_accel.strategies import fabric
from lightning_accel.strategies.trainer import AccelStrategy

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("from-accelerate.md", "from-lightning-strategies.md")
LIGHTNING = (DOCS / "from-lightning-strategies.md").read_text()
ACCELERATE = (DOCS / "from-accelerate.md").read_text()


def section(page: str, title: str) -> str:
    (found,) = re.findall(rf"^## `?{re.escape(title)}`?\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return str(found)


def named(text: str) -> set[str]:
    """What the first cells of a section's tables name."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return {name for cell in cells for name in re.findall(r"`([^`]*)`", cell)}


def arguments(kind: Any) -> set[str]:
    """The arguments of a constructor; those that it passes on to a base are the base's."""
    found = set(inspect.signature(kind).parameters)
    if kind.__name__.startswith("Accel") and "kwargs" in found:
        base = fabric.AccelFabricStrategy if issubclass(kind, fabric.AccelFabricStrategy) else AccelStrategy
        found |= set(inspect.signature(base).parameters)
    if kind is GradScaler:
        found |= {field.name for field in dataclasses.fields(ScaleRule)}
    return found - {"self", "kwargs", "settings", "unknown"}


OURS: dict[str, list[Any]] = {
    name: [getattr(strategies, name), getattr(fabric, name)]
    for name in ("AccelDDPStrategy", "AccelZeROStrategy", "AccelFSDPStrategy")
}
OURS |= {kind.__name__: [kind] for kind in (Accelerator, AccelPrecision, GradScaler, PowerSGD)}
OURS |= {"Trainer": [Trainer], "Fabric": [Fabric]}


def calls(page: str) -> list[ast.Call]:
    """Every call of ours that a page's code has, those within others included."""
    codes = [code.split(": ")[0] for code in re.findall(r"`([^`]*\(.*?\))`", page)]
    found = []
    for code in codes:
        try:
            tree = ast.parse(code.removeprefix("with "), mode="eval")
        except SyntaxError:
            continue  # code.split has cut a dict
        found += [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [call for call in found if isinstance(call.func, ast.Name) and call.func.id in OURS]


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_here_exists(page: str) -> None:
    text = (DOCS / page).read_text()
    found = calls(text)
    assert len(found) > 15
    unknown = [
        f"{call.func.id}({keyword.arg}=)"  # type: ignore[attr-defined]
        for call in found
        for kind in OURS[call.func.id]  # type: ignore[attr-defined]
        for keyword in call.keywords
        if keyword.arg not in arguments(kind)
    ]
    assert unknown == []
    attributes = set(re.findall(r"`accelerator\.(\w+)`", text))
    assert sorted(name for name in attributes if not hasattr(Accelerator, name) and name != "fabric") == []
    options = {
        name
        for option in typer.main.get_command(app).commands["launch"].params
        for name in option.opts  # type: ignore[attr-defined]
    }
    assert set(re.findall(r"`accel launch (--\w+)", text)) <= options
    rows = set(re.findall(r"`(accel_\w+)`", text))
    assert rows <= set(StrategyRegistry.available_strategies())
    for path in re.findall(r"\]\(([\w.-]*)\)", text):
        assert (DOCS / path).exists(), path


def test_what_is_the_same_under_accelerates_name_exists() -> None:
    rows = [line.split("|") for line in ACCELERATE.splitlines() if line.startswith("| ")]
    same = {name for row in rows if row[2].strip().startswith("the same") for name in re.findall(r"`([^`]*)`", row[1])}
    ours = arguments(Accelerator) | set(dir(Accelerator)) | set(dir(importlib.import_module("lightning_accel")))
    command = typer.main.get_command(app).commands["launch"]  # type: ignore[attr-defined]
    ours |= {name for option in command.params for name in option.opts} | {"LocalSGD"}
    assert len(same) > 60
    assert sorted(same - ours - set(importlib.import_module("lightning_accel").__all__)) == []


@pytest.mark.parametrize("kind", [DDPStrategy, FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_every_argument_of_lightnings_strategies_is_there(kind: type[Any]) -> None:
    there = {name.split(" ")[0] for name in named(section(LIGHTNING, kind.__name__))}
    assert sorted(set(inspect.signature(kind).parameters) - there) == []


@pytest.mark.parametrize("kind", [DDPStrategy, FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_every_row_is_an_argument_of_lightnings(kind: type[Any]) -> None:
    of_torch = {"find_unused_parameters", "static_graph", "gradient_as_bucket_view", "bucket_cap_mb"}
    rows = named(section(LIGHTNING, kind.__name__)) - of_torch
    assert rows <= set(inspect.signature(kind).parameters)


def test_every_registered_name_is_there() -> None:
    kinds = ("ddp", "fsdp", "deepspeed")
    names = {name for name in StrategyRegistry.available_strategies() if name.split("_")[0] in kinds}
    assert sorted(names - named(section(LIGHTNING, "Registered names"))) == []


PLUGINS = ["FullyShardedDataParallelPlugin", "DeepSpeedPlugin", "DataLoaderConfiguration"]


def test_every_argument_of_accelerates_is_there() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    parts: dict[str, set[str]] = {"Accelerator(...)": set(inspect.signature(accelerate.Accelerator).parameters)}
    for name in PLUGINS:
        parts[name] = {field.name for field in dataclasses.fields(getattr(accelerate.utils, name))}
    for title, expected in parts.items():
        assert sorted(expected - named(section(ACCELERATE, title))) == [], title
    methods = {
        name
        for name, value in inspect.getmembers(accelerate.Accelerator, inspect.isfunction)
        if not name.startswith("_")
    }
    assert sorted(methods - named(section(ACCELERATE, "Methods"))) == []


def test_every_flag_of_accelerate_launch_is_there() -> None:
    launch = pytest.importorskip("accelerate.commands.launch", reason="needs accelerate")
    parser = launch.launch_command_parser()
    flags = {max(action.option_strings, key=len) for action in parser._actions if action.option_strings}
    of_families = ("--megatron_lm", "--parallelism_config", "--tpu", "--no_tpu", "--vm", "--env", "--fp8_", "--aws_")
    rest = {flag for flag in flags if not flag.startswith((*of_families, "--help"))}
    there = named(section(ACCELERATE, "accelerate launch"))
    assert sorted({flag.replace("-", "_").replace("__", "--", 1) for flag in rest} - there) == []
