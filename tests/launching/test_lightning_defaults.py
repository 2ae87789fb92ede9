"""What a Trainer and a Fabric take where the script says nothing."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision as TrainerMixedPrecision

from lightning_accel.launching.lightning_defaults import _of_file, offer
from lightning_accel.strategies.fabric import AccelZeROStrategy

VARIABLES = {"ACCELERATOR": "cpu", "STRATEGY": "accel_fsdp", "DEVICES": "2", "NUM_NODES": "1"}
VARIABLES |= {"PRECISION": "bf16-mixed", "ACCUMULATE_GRAD_BATCHES": "4", "GRADIENT_CLIP_VAL": "0.5"}
AUTO = {"accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "precision": None}
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture(autouse=True)
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Fabric, Trainer):
        monkeypatch.setattr(kind, "__init__", kind.__init__)  # what it was comes back
    if find_spec("pytorch_lightning") is not None:
        monkeypatch.setattr(
            "pytorch_lightning.Trainer.__init__", importlib.import_module("pytorch_lightning").Trainer.__init__
        )
    for name, value in VARIABLES.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    offer()


@pytest.mark.parametrize(
    ("given", "row", "precision"),
    [
        ({}, "fsdp", "bf16-mixed"),
        (AUTO, "fsdp", "bf16-mixed"),
        ({"strategy": "accel_zero1"}, "zero1", "bf16-mixed"),
        ({"strategy": AccelZeROStrategy(stage=2), "precision": "32-true"}, "zero2", "32-true"),
        ({"plugins": [MixedPrecision("16-mixed", "cpu")]}, "fsdp", "16-mixed"),
        ({"plugins": TorchCheckpointIO()}, "fsdp", "bf16-mixed"),
    ],
)
def test_what_the_script_says_goes_first(given: dict[str, Any], row: str, precision: str) -> None:
    fabric = Fabric(**given)
    assert fabric.strategy.row.name == row  # type: ignore[attr-defined]
    assert fabric.strategy.precision.precision == precision
    assert fabric.strategy.num_processes == 2  # type: ignore[attr-defined]


class Named(Trainer):
    """A user's own, for which Lightning would read PL_NAMED_*."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@pytest.mark.parametrize("kind", [Trainer, Named])
@pytest.mark.parametrize(
    ("given", "row", "precision"),
    [
        ({}, "fsdp", "bf16-mixed"),
        ({**AUTO, "accumulate_grad_batches": 1, "gradient_clip_val": None}, "fsdp", "bf16-mixed"),
        ({"plugins": [TrainerMixedPrecision("16-mixed", "cpu")]}, "fsdp", "16-mixed"),
        ({"strategy": "accel_zero1", "precision": "32-true"}, "zero1", "32-true"),
    ],
)
def test_a_trainer(kind: type[Trainer], given: dict[str, Any], row: str, precision: str) -> None:
    trainer = kind(**QUIET, **given)
    assert trainer.strategy.row.name == row  # type: ignore[attr-defined]
    assert (trainer.precision, trainer.num_devices) == (precision, 2)
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (4, 0.5)


def test_the_package_pytorch_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("pytorch_lightning")
    monkeypatch.setenv("PL_TRAINER_STRATEGY", "ddp")
    assert package.Trainer(**QUIET, **AUTO).num_devices == 2


def test_a_lightning_cli_which_passes_every_argument() -> None:
    pytest.importorskip("jsonargparse")
    make = importlib.import_module("lightning.pytorch.cli").LightningCLI
    settings = {**QUIET, "max_steps": 1}
    trainer = make(BoringModel, run=False, args=[], trainer_defaults=settings, seed_everything_default=False).trainer
    assert trainer.strategy.row.name == "fsdp"
    assert (trainer.num_devices, trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (2, 4, 0.5)
    args = ["--trainer.devices=1", "--trainer.accumulate_grad_batches=3"]
    trainer = make(BoringModel, run=False, args=args, trainer_defaults=settings, seed_everything_default=False).trainer
    assert (trainer.num_devices, trainer.accumulate_grad_batches) == (1, 3)


def test_what_the_trainer_says_goes_first() -> None:
    trainer = Trainer(**QUIET, devices=1, accumulate_grad_batches=3, gradient_clip_val=2.0)
    assert (trainer.num_devices, trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (1, 3, 2.0)


@pytest.mark.parametrize("kind", [Trainer, Fabric])
def test_a_file_of_deepspeed(kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.setenv("ACCEL_DEEPSPEED_CONFIG", str(tmp_path / "ds.json"))
    for name in ("STRATEGY", "PRECISION"):
        monkeypatch.delenv(f"PL_TRAINER_{name}")
    quiet = QUIET if kind is Trainer else {}
    for given in ({}, {"strategy": "auto"}):
        made = kind(**quiet, **given)
        assert (made.strategy.row.name, made.strategy.has_file) == ("zero1", True)
    with pytest.warns(UserWarning, match="is not used by a .* whose strategy the script names: 'accel_fsdp'"):
        assert kind(**quiet, strategy="accel_fsdp").strategy.row.name == "fsdp"


def test_a_file_of_deepspeed_and_another_tree_of_classes() -> None:
    with pytest.raises(ValueError, match="Import lightning.pytorch"):
        _of_file("ds.json", None)
