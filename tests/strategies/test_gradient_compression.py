"""`gradient_compression` of the strategies."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision.amp import MixedPrecision
from models import FLOAT64, Data, Regression, trainer
from torch import Tensor, nn

import lightning_accel.strategies.fabric as twins
from harness import Ranks
from lightning_accel import engine_of
from lightning_accel.core import PowerSGD
from lightning_accel.manual import Accelerator
from lightning_accel.strategies import AccelDDPStrategy, AccelFSDPStrategy, AccelZeROStrategy

SETTINGS = PowerSGD(start_powerSGD_iter=0)


def sent_by_fabric(settings: PowerSGD | None) -> int:
    made = Fabric(accelerator="cpu", devices=2, strategy=twins.AccelDDPStrategy(gradient_compression=settings))
    made.launch()
    net = nn.Linear(32, 32)
    model, optimizer = made.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    made.backward(model(torch.randn(4, 32)).square().mean())
    optimizer.step()
    return int(engine_of(net).report().bytes_sent["all_reduce"])


def sent_by_hand() -> int:
    accelerator = Accelerator(cpu=True, strategy=twins.AccelDDPStrategy(gradient_compression=SETTINGS))
    net = nn.Linear(32, 32)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    accelerator.backward(model(torch.randn(4, 32)).square().mean())
    optimizer.step()
    return int(engine_of(net).report().bytes_sent["all_reduce"])


def test_fewer_bytes_travel(ranks2: Ranks) -> None:
    """A vector of 32 numbers whole, 32 + 32 for the matrix, and one that says whether it is used."""
    assert ranks2.run(sent_by_fabric, None)[0] >= 4 * (32 * 32 + 32)
    assert ranks2.run(sent_by_fabric, SETTINGS) == [4 * (32 + 32 + 1 + 32)] * 2
    assert ranks2.run(sent_by_hand) == [4 * (32 + 32 + 1 + 32)] * 2


@pytest.mark.parametrize(
    "kind", [AccelFSDPStrategy, AccelZeROStrategy, twins.AccelFSDPStrategy, twins.AccelZeROStrategy]
)
def test_other_strategies_refuse_it(kind: Any) -> None:
    with pytest.raises(ValueError, match="Expected gradient_compression for row 'ddp' only"):
        kind(gradient_compression=SETTINGS)


@pytest.mark.parametrize("kind", [AccelDDPStrategy, twins.AccelDDPStrategy])
def test_another_dtype_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="Expected gradient_compression without reduce_dtype"):
        kind(gradient_compression=SETTINGS, reduce_dtype=torch.bfloat16)


class Scaler(torch.amp.GradScaler):
    """One that the engine does not know."""


def test_a_scaler_of_another_class_is_refused() -> None:
    with pytest.raises(
        ValueError, match="Expected a lightning_accel.core.GradScaler together with gradient_compression"
    ):
        Fabric(
            accelerator="cpu",
            devices=1,
            strategy=twins.AccelDDPStrategy(gradient_compression=SETTINGS),
            plugins=[MixedPrecision("16-mixed", device="cpu", scaler=Scaler("cpu"))],
        )


def fitted(settings: PowerSGD | None, folder: Path) -> tuple[list[Tensor], list[str]]:
    """Parameters after two epochs, the second one in a fit that resumes; and what that said of PowerSGD."""
    said: list[str] = []
    module = Regression(optimizer="SGD")
    for epochs in (1, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = trainer(
                AccelDDPStrategy(gradient_compression=settings),
                max_epochs=epochs,
                accumulate_grad_batches=2,
                gradient_clip_val=0.5,
            )
            made.fit(module, Data(), ckpt_path=None if epochs == 1 else folder / "first.ckpt")
        said += [str(one.message) for one in caught if "PowerSGD" in str(one.message)]
        if epochs == 1:
            made.save_checkpoint(folder / "first.ckpt")
    return [p.detach().clone() for p in module.parameters()], said


def test_a_fit_that_resumes(ranks2: Ranks, tmp_path: Path) -> None:
    """With all columns nothing is left out: parameters are those of whole gradients."""
    everything = PowerSGD(matrix_approximation_rank=5, start_powerSGD_iter=1, min_compression_rate=0.01)
    plain = ranks2.run(fitted, None, tmp_path)
    for rank, (found, said) in enumerate(ranks2.run(fitted, everything, tmp_path)):
        assert len(said) == (rank == 0)
        for ours, theirs in zip(found, plain[rank][0], strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < FLOAT64
        assert any(not torch.equal(ours, theirs) for ours, theirs in zip(found, plain[rank][0], strict=True))
