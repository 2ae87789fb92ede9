"""Times and floating-point operations that a DeepSpeed file asks for, with every kind of loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.fabric import Fabric
from models import Net, Regression, Samples, loader, trainer
from torch import nn
from torch.utils.data import DataLoader

import lightning_accel.strategies.fabric as twins
from harness import Ranks
from lightning_accel import Accelerator, engine_of
from lightning_accel.core import Report
from lightning_accel.core.times import PHASES, TOTAL, StepTimes
from lightning_accel.deepspeed_config import DeepSpeedConfig
from lightning_accel.deepspeed_config.meaning import Meaning
from lightning_accel.strategies import AccelZeROStrategy
from rows import everyday

STAGES = [pytest.param(stage, marks=[] if stage in (2, 3) else pytest.mark.matrix) for stage in range(4)]
SHARE = 4  # a rank's samples in a batch
LAYER = 2 * SHARE * 5 * 5
LAST = 2 * SHARE * 5 * 3
FORWARD = 4 * LAYER + LAST
"""Of a batch: a product and a sum for each weight and sample."""


class Shown:
    """Reports as they are made, and texts as they are shown, within it."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.reports: list[Report] = []
        self._patches = [
            patch("lightning_accel.strategies.deepspeed_reports.rank_zero_info", self.texts.append),
            patch("lightning_accel.core.engine.measure", self._measured),
        ]

    def _measured(self, *args: Any) -> Report:
        from lightning_accel.core.report import measure

        self.reports.append(measure(*args))
        return self.reports[-1]

    def __enter__(self) -> Shown:
        for each in self._patches:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._patches:
            each.stop()

    def times(self) -> list[StepTimes | None]:
        return [report.times for report in self.reports]


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, "gradient_clipping": 0, **more}


def require(times: StepTimes | None, steps: int) -> None:
    assert times is not None
    assert times.steps == steps
    for phase in ("forward", "backward", "gradients", "update", TOTAL):
        assert times.mean_ms[phase] > 0
        assert times.median_ms[phase] > 0
    assert sum(times.mean_ms[phase] for phase in PHASES) == pytest.approx(times.mean_ms[TOTAL])


def fit(asked: dict[str, Any], **settings: Any) -> Shown:
    with Shown() as shown:
        trainer(AccelZeROStrategy(config=asked), max_epochs=1, **settings).fit(Regression(), loader())
    shown._patches.clear()  # the rest travels
    return shown


@pytest.mark.parametrize("stage", STAGES)
def test_times_with_the_trainer(ranks2: Ranks, stage: int) -> None:
    asked = config(stage, wall_clock_breakdown=True, steps_per_print=3)
    for rank, shown in enumerate(ranks2.run(fit, asked)):
        assert len(shown.reports) == 2, "after three steps, and after the fourth at the end"
        require(shown.times()[0], 3)
        require(shown.times()[1], 1)
        for report in shown.reports:
            assert report.rank == rank
            assert report.slowest is not None
            assert (report.times is not None and report.times.mean_ms["parameters"] > 0) == (stage > 0)
        assert all("ms in each of" in text and ", the slowest:" in text for text in shown.texts)
        assert len(shown.texts) == 2


def test_steps_are_not_timed_unless_asked(ranks2: Ranks) -> None:
    for shown in ranks2.run(fit, config(2, wall_clock_breakdown=False, comms_logger={"enabled": True})):
        assert shown.times() == [None]


def profile(path: Path | None = None, **more: Any) -> dict[str, Any]:
    file = {} if path is None else {"output_file": str(path)}
    return {"flops_profiler": {"enabled": True, **file, **more}}


def row(text: str, name: str) -> list[str]:
    (found,) = (line.split() for line in text.splitlines() if line.split()[:1] == [name])
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_operations_with_the_trainer(ranks2: Ranks, stage: int, tmp_path: Path) -> None:
    path = tmp_path / "new" / "flops.txt"
    ranks2.run(fit, config(stage, **profile(path, profile_step=0, top_modules=2)))
    text = path.read_text()
    assert text.startswith("floating-point operations of step 1, rank 0 of 2: its own samples, 1 micro-batches")
    assert f" {FORWARD}  in " in text
    assert "(times of step 2" in text
    # Nobody asks for the gradient of the input.
    backward = f"{(2 * FORWARD - LAYER) / 1e3:.2f}"
    assert row(text, "Regression") == ["Regression", "138", f"{FORWARD}", backward, "K", "100.0%"]
    assert row(text, "first")[2:5] == ["30", f"{LAYER}", f"{LAYER}"]
    assert row(text, "last")[2:5] == ["18", f"{LAST}", f"{2 * LAST}"]
    assert text.count("linear (Linear)") == 3


def test_the_other_keys_are_heeded(ranks2: Ranks) -> None:
    asked = config(2, **profile(module_depth=1, detailed=False), gradient_accumulation_steps=2)
    first, second = ranks2.run(fit, asked)
    (text,) = first.texts
    assert second.texts == []
    assert "of step 2, rank 0 of 2: its own samples, 2 micro-batches" in text, "one step comes before"
    assert "FLOPS" not in text, "the fit had two steps"
    assert "1: net " in text
    assert "(Net)" not in text
    assert "    2: " not in text


def fabric_loop(asked: dict[str, Any]) -> tuple[Shown, Report]:
    with Shown() as shown:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=twins.AccelZeROStrategy(config=asked))
        fabric.launch()
        net = Net()
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        for _ in range(3):
            fabric.backward(model(torch.ones(SHARE, 5, dtype=torch.float64)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        report = engine_of(net).report(all_ranks=True)
    shown._patches.clear()
    return shown, report


@pytest.mark.parametrize("stage", STAGES)
def test_fabric(ranks2: Ranks, stage: int) -> None:
    asked = config(stage, wall_clock_breakdown=True, **profile())
    results = ranks2.run(fabric_loop, asked)
    for _, report in results:
        require(report.times, 3)
        assert report.slowest is not None
    (text,) = results[0][0].texts
    assert "of step 2, rank 0" in text
    assert row(text, "Net")[:3] == ["Net", "138", f"{FORWARD}"]
    assert "FLOPS" in text
    assert results[1][0].texts == []


def own_loop(asked: dict[str, Any]) -> Shown:
    with Shown() as shown:
        accelerator = Accelerator(deepspeed_config=asked, cpu=True)
        net = Net()
        data: Any = DataLoader(Samples(32), batch_size=SHARE)
        model, optimizer, data = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), data)
        for _, x, y in data:
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    shown._patches.clear()
    return shown


@pytest.mark.parametrize("kind", everyday(["zero2"]))
def test_the_accelerator(ranks2: Ranks, kind: str) -> None:
    asked = config(int(kind[-1]), wall_clock_breakdown=True, steps_per_print=2, **profile())
    first, second = ranks2.run(own_loop, asked)
    for shown in (first, second):
        for times in shown.times():
            require(times, 2)
        assert len(shown.times()) == 2
    assert len([text for text in first.texts if "ms in each of 2 steps" in text]) == 2
    assert len([text for text in first.texts if "floating-point operations of step 2" in text]) == 1


@pytest.mark.parametrize("name", ["wall_clock_breakdown", "flops_profiler.profile_step"])
def test_auto_is_refused(name: str) -> None:
    section, _, key = name.partition(".")
    read = DeepSpeedConfig.read({section: {key: "auto"} if key else "auto"})
    with pytest.raises(ValueError, match=f"'auto' for {name}"):
        Meaning.of(read)
