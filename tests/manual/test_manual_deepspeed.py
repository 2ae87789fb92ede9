"""An Accelerator with a DeepSpeed file: what it says is done, and done once."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_utilities.core import rank_zero
from models import Net, Samples, values
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness import Ranks
from lightning_accel import Accelerator
from lightning_accel.manual.choices import choose_strategy
from lightning_accel.schedules import WarmupLR
from lightning_accel.strategies import fabric as twins

FILE: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.1,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.5}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
}
LR = 0.02


def said_by(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in found]


def train(config: dict[str, Any], *, clip: float | None = None, **settings: Any) -> tuple[dict[str, Tensor], Any]:
    """An epoch of 32 samples; what has become of the model, and what of the file."""
    settings.setdefault("gradient_accumulation_steps", 2)
    accelerator = Accelerator(deepspeed_config=config, cpu=True, **settings)
    net = Net()
    optimizer: Any = accelerator.make_optimizer(net, lr=LR)
    scheduler: Any = accelerator.make_scheduler(optimizer, warmup_num_steps=3) if "scheduler" in config else None
    loader: Any = DataLoader(Samples(32), batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, loader, scheduler)
    rates, norms = [], []
    for _, x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            if clip is not None:
                norm = accelerator.clip_grad_norm_(model.parameters(), clip)
                norms += [] if norm is None else [norm.item()]
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            rates.append(optimizer.param_groups[0]["lr"])
    told = {"row": accelerator.fabric.strategy.row.name, "rates": rates, "norms": norms}  # type: ignore[attr-defined]
    told |= {"steps": accelerator.gradient_accumulation_steps, "precision": accelerator.mixed_precision}
    return values(net), told


def alone(clip: float, *, schedule: bool = True) -> tuple[dict[str, Tensor], list[float]]:
    """The same on one process with torch: 2 steps of 16 samples."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.5)
    scheduler = WarmupLR(optimizer, warmup_max_lr=LR, warmup_num_steps=3) if schedule else None
    rates = []
    for _, x, y in DataLoader(Samples(32), batch_size=16):
        nn.functional.mse_loss(net(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return {name: parameter.detach() for name, parameter in net.named_parameters()}, rates


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("stage", "clip"),
    [
        (0, None),
        (2, 0.1),
        (3, math.inf),
        *(
            pytest.param(stage, clip, marks=pytest.mark.matrix)
            for stage, clip in [
                (0, 0.1),
                (0, math.inf),
                (1, None),
                (1, 0.1),
                (2, None),
                (2, math.inf),
                (3, None),
                (3, 0.1),
            ]
        ),
    ],
)
def test_the_file_is_followed_and_clips_once(ranks2: Ranks, stage: int, clip: float | None) -> None:
    """With or without clip_grad_norm_ in the loop; a schedule counts optimizer steps on any number of ranks."""
    expected, rates = alone(0.1)
    for found, told in ranks2.run(train, {**FILE, "zero_optimization": {"stage": stage}}, clip=clip):
        assert_same(found, expected)
        assert (told["row"], told["steps"]) == ({0: "ddp", 1: "zero1", 2: "zero2", 3: "fsdp"}[stage], 2)
        assert told["rates"] == pytest.approx(rates)
        assert len(told["norms"]) == (0 if clip is None else 2)


@pytest.mark.parametrize(
    ("given", "clip", "expected"), [("auto", 0.05, 0.05), (None, 0.05, 0.05), (None, None, 1.0), (0, None, 0.0)]
)
def test_the_loops_clipping_counts_where_the_file_has_none(
    ranks2: Ranks, given: Any, clip: float | None, expected: float
) -> None:
    """A file without a schedule. DeepSpeed's limit of 1.0 has a test of its own below."""
    config = {key: value for key, value in FILE.items() if key != "scheduler"}
    config |= {"gradient_clipping": given}
    plain, _ = alone(expected, schedule=False)
    for found, _ in ranks2.run(train, config, clip=clip):
        assert_same(found, plain)


def scaled_steps() -> list[float]:
    """Norms that steps were made with where DeepSpeed's limit is lower than the gradients', of one process."""
    accelerator = Accelerator(deepspeed_config={"optimizer": {"type": "SGD", "params": {"lr": 1.0}}}, cpu=True)
    layer = nn.Linear(4, 1, bias=False)
    model, optimizer = accelerator.prepare(layer, accelerator.make_optimizer(layer))
    found = []
    for _ in range(2):
        before = layer.weight.detach().clone()
        accelerator.backward(model(torch.full((1, 4), 3.0)).sum() * 10)
        optimizer.step()
        optimizer.zero_grad()
        found.append((layer.weight.detach() - before).norm().item())
    return found


def test_deepspeeds_limit_where_nobody_says_one(ranks2: Ranks) -> None:
    for found in ranks2.run(scaled_steps):
        assert found == pytest.approx([1.0, 1.0])


def fp16(config: dict[str, Any]) -> tuple[Any, ...]:
    accelerator = Accelerator(deepspeed_config=config, cpu=True)
    net = Net().float()
    model, optimizer = accelerator.prepare(net, accelerator.make_optimizer(net))
    _, x, y = next(iter(DataLoader(Samples(8), batch_size=4)))
    before = values(net)
    accelerator.backward(nn.functional.mse_loss(model(x.float()).float(), y.float()))
    optimizer.step()
    after = values(net)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in after]).norm().item()
    scaler = accelerator.fabric.strategy.grad_scaler  # type: ignore[attr-defined]
    return accelerator.mixed_precision, scaler.get_scale(), moved


def test_clipping_sees_gradients_without_the_loss_scale(ranks2: Ranks) -> None:
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": 1e-3, "fp16": {"enabled": True}}
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}}
    config["fp16"] |= {"initial_scale_power": 8}
    for precision, scale, moved in ranks2.run(fp16, config):
        assert (precision, scale) == ("fp16", 256.0)
        assert moved == pytest.approx(1e-3, rel=1e-2)


def refused(config: dict[str, Any], **settings: Any) -> str:
    try:
        train(config, **settings)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"clip": 0.5}, "clipping to be said once, got 'clip_grad_norm_(..., 0.5)' and gradient_clipping 0.1"),
        ({"gradient_clipping": 0}, {"clip": 0.5}, "got 'clip_grad_norm_(..., 0.5)' and gradient_clipping 0.0"),
        ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4"),
        ({"train_micro_batch_size_per_gpu": 8}, {}, "got 16 = 8 × 2 × 2? 8 × 2 × 2 = 32"),
        (
            {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2},
            {},
            "got a DataLoader with batch_size=4",
        ),
        ({"bf16": {"enabled": True}}, {"mixed_precision": "fp16"}, "Expected precision to be said once"),
        ({"optimizer": None}, {}, "Expected an optimizer in config, got none"),
    ],
)
def test_contradictions(ranks2: Ranks, changes: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    for said in ranks2.run(refused, {**FILE, **changes}, **settings):
        assert message in said


def loops_own() -> list[str]:
    """What is said where the loop makes its own optimizer, and no schedule; on rank 0."""
    accelerator = Accelerator(deepspeed_config={**FILE, "train_batch_size": "auto"}, cpu=True)
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    _, x, y = next(iter(DataLoader(Samples(8), batch_size=4)))

    def step() -> None:
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()

    assert rank_zero.rank_zero_only.rank == accelerator.process_index
    return [line for line in [*said_by(step), *said_by(step)] if "config" in line]


def test_what_is_not_used_is_said_once(ranks2: Ranks) -> None:
    said, others = ranks2.run(loops_own)
    assert len(said) == 2, said
    assert "The script has made an optimizer, and config has another (SGD)" in said[0]
    assert "config has a scheduler (WarmupLR) that is not used" in said[1]
    assert others == []


def by_environment(path: str) -> tuple[str, int]:
    os.environ["ACCEL_DEEPSPEED_CONFIG"] = path
    try:
        accelerator = Accelerator(cpu=True)
    finally:
        del os.environ["ACCEL_DEEPSPEED_CONFIG"]
    return accelerator.fabric.strategy.row.name, accelerator.gradient_accumulation_steps  # type: ignore[attr-defined]


def test_the_launchers_file(ranks2: Ranks, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"gradient_accumulation_steps": 3, "zero_optimization": {"stage": 1}}))
    assert ranks2.run(by_environment, str(tmp_path / "ds.json")) == [("zero1", 3)] * 2


def test_who_says_the_strategy() -> None:
    file = {"zero_optimization": {"stage": 1}}
    chosen = choose_strategy(None, file, {"ACCEL_STRATEGY": "accel_fsdp"})
    assert isinstance(chosen, twins.AccelZeROStrategy)
    assert chosen.row.name == "zero1"
    assert choose_strategy(chosen, None, {"ACCEL_DEEPSPEED_CONFIG": "nowhere.json"}) is chosen
    assert choose_strategy(None, None, {"ACCEL_STRATEGY": "accel_fsdp"}).row.name == "fsdp"
    assert choose_strategy(None, None, {}).row.name == "ddp"
    with pytest.raises(ValueError, match="Expected strategy or deepspeed_config, which says it, got both: 'ddp'"):
        choose_strategy("ddp", file, {})
    with pytest.raises(ValueError, match=r"got 'ddp' and, in ACCEL_DEEPSPEED_CONFIG .* ds.json. Leave one of them"):
        choose_strategy("ddp", None, {"ACCEL_DEEPSPEED_CONFIG": "ds.json"})
    with pytest.raises(FileNotFoundError, match="there is none"):
        choose_strategy(None, "nowhere.json", {})


def contradicts_later() -> None:
    accelerator = Accelerator(deepspeed_config={"gradient_accumulation_steps": 2, "gradient_clipping": 1}, cpu=True)
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="Expected gradient_accumulation_steps to be said once, got 3 and 2 batches"):
        accelerator.gradient_accumulation_steps = 3
    with pytest.raises(ValueError, match="got 'clip_grad_value_' and gradient_clipping 1.0 by norm"):
        accelerator.clip_grad_value_(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="Expected a step without a closure"):
        optimizer.step(lambda: 0.0)


def test_contradictions_in_the_loop(ranks2: Ranks) -> None:
    ranks2.run(contradicts_later)


def options_beside_the_file() -> tuple[str, float]:
    strategy = twins.AccelZeROStrategy(config={"zero_optimization": {"stage": 1}}, bucket_cap_mb=7.0)
    accelerator = Accelerator(strategy=strategy, cpu=True)
    said = said_by(lambda: accelerator.prepare(Net()))
    assert not any("left to the loop" in line for line in said)
    return strategy.row.name, strategy._options.bucket_cap_mb


def test_a_strategy_with_a_file_is_the_same(ranks2: Ranks) -> None:
    assert ranks2.run(options_beside_the_file) == [("zero1", 7.0)] * 2


def without_a_file() -> str:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="Expected a DeepSpeed file for make_scheduler, got none"):
        accelerator.make_scheduler(torch.optim.SGD(Net().parameters(), lr=0.1))
    return "refused"


def test_without_a_file(ranks2: Ranks) -> None:
    assert ranks2.run(without_a_file) == ["refused"] * 2
