"""What a Fabric takes where the script says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision

from lightning_accel.launching.fabric_defaults import offer
from lightning_accel.strategies.fabric import AccelZeROStrategy

VARIABLES = {"ACCELERATOR": "cpu", "STRATEGY": "accel_fsdp", "DEVICES": "2", "NUM_NODES": "1"}
VARIABLES["PRECISION"] = "bf16-mixed"


@pytest.fixture(autouse=True)
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stock = Fabric.__init__
    for name, value in VARIABLES.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    offer()
    yield
    Fabric.__init__ = stock  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("given", "row", "precision"),
    [
        ({}, "fsdp", "bf16-mixed"),
        ({"strategy": "accel_zero1"}, "zero1", "bf16-mixed"),
        ({"strategy": AccelZeROStrategy(stage=2), "precision": "32-true"}, "zero2", "32-true"),
        ({"plugins": [MixedPrecision("16-mixed", "cpu")]}, "fsdp", "16-mixed"),
    ],
)
def test_what_the_script_says_goes_first(given: dict[str, Any], row: str, precision: str) -> None:
    fabric = Fabric(**given)
    assert fabric.strategy.row.name == row  # type: ignore[attr-defined]
    assert fabric.strategy.precision.precision == precision
    assert fabric.strategy.num_processes == 2  # type: ignore[attr-defined]
