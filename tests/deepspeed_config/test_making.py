"""The optimizers that DeepSpeed's configurations name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_accel.deepspeed_config import DeepSpeedConfig
from lightning_accel.deepspeed_config.making import make_optimizer, make_scheduler
from lightning_accel.optimizers import MuonWithAuxAdam


def make(kind: str, module: nn.Module | None = None, **params: Any) -> torch.optim.Optimizer:
    config = DeepSpeedConfig.read({"optimizer": {"type": kind, "params": params}})
    optimizer = make_optimizer(config, (module or nn.Linear(2, 3)).named_parameters())
    assert optimizer is not None
    return optimizer


@pytest.mark.parametrize(
    ("kind", "params", "made", "group"),
    [
        ("Adam", {}, torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}),
        ("adam", {"lr": 0.1, "weight_decay": 0.2}, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.2}),
        ("Adam", {"adam_w_mode": False, "weight_decay": 0.2}, torch.optim.Adam, {"weight_decay": 0.2}),
        ("AdamW", {"adam_w_mode": False}, torch.optim.AdamW, {"weight_decay": 0.0}),
        ("AdamW", {"torch_adam": True}, torch.optim.AdamW, {"weight_decay": 0.01}),
        ("AdamW", {"torch_adam": True, "weight_decay": 0.3}, torch.optim.AdamW, {"weight_decay": 0.3}),
        ("AdamW", {"betas": [0.5, 0.6]}, torch.optim.AdamW, {"betas": (0.5, 0.6)}),
        ("Adagrad", {"lr": 0.2}, torch.optim.Adagrad, {"lr": 0.2, "eps": 1e-10}),
        ("SGD", {"lr": 0.2, "momentum": 0.9}, torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "nesterov": False}),
        ("RMSprop", {"lr": 0.2, "alpha": 0.5}, torch.optim.RMSprop, {"lr": 0.2, "alpha": 0.5}),
    ],
)
def test_optimizers(kind: str, params: dict[str, Any], made: type, group: dict[str, Any]) -> None:
    optimizer = make(kind, **params)
    assert type(optimizer) is made
    (found,) = optimizer.param_groups
    assert {name: found[name] for name in group} == group
    assert len(found["params"]) == 2


class Words(nn.Module):
    """A table, a matrix and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layer = nn.Linear(4, 3)


def test_muon_takes_matrices_and_adam_the_rest() -> None:
    module = Words()
    optimizer = make("Muon", module, lr=0.1, muon_lr=0.2, momentum=0.5, weight_decay=0.3)
    assert isinstance(optimizer, MuonWithAuxAdam)
    muon, adam = optimizer.param_groups
    assert muon["params"] == [module.layer.weight]
    assert (muon["use_muon"], muon["lr"], muon["momentum"], muon["weight_decay"]) == (True, 0.2, 0.5, 0.3)
    assert [id(p) for p in adam["params"]] == [id(module.embed.weight), id(module.layer.bias)]
    assert (adam["use_muon"], adam["lr"], adam["betas"], adam["eps"]) == (False, 0.1, (0.9, 0.95), 1e-10)
    assert adam["decoupled_weight_decay"]
    rates = [group["lr"] for group in make("Muon", module).param_groups]
    assert rates == [0.02, 3e-4]  # DeepSpeed's
    assert [group["lr"] for group in make("Muon", module, muon_lr=0.5, adam_lr=0.4).param_groups] == [0.5, 0.4]
    assert "decoupled_weight_decay" not in make("Muon", nn.Linear(2, 3, bias=False)).param_groups[0]
    with pytest.raises(ValueError, match=r"got 'weight', of shape \(2, 1, 3, 3\)"):
        make("Muon", nn.Conv2d(1, 2, 3))
    with pytest.raises(ValueError, match="per_head_muon in config to be false"):
        make("Muon", module, per_head_muon=True)


def test_what_is_not_trained_is_passed_over() -> None:
    module = nn.Linear(2, 3)
    module.bias.requires_grad = False
    assert len(make("Adam", module).param_groups[0]["params"]) == 1
    module.weight.requires_grad = False
    with pytest.raises(ValueError, match="got none"):
        make("Adam", module)


def test_what_torch_does_not_accept_is_an_error_with_the_files_name() -> None:
    with pytest.raises(ValueError, match=r"Expected optimizer.params in config that RMSprop accepts, got .*alpha"):
        make("RMSprop", alpha="x")
    with pytest.raises(ValueError, match=r"Expected optimizer.params in config that SGD accepts.*Nesterov"):
        make("SGD", nesterov=True)


@pytest.mark.parametrize("kind", ["Adam", "Lion", "SGD", "Muon"])
def test_who_clips_by_the_optimizer_is_told_where_to_say_it(kind: str) -> None:
    with pytest.raises(ValueError, match=r"optimizer.params.max_grad_norm \(say gradient_clipping\)"):
        make(kind, max_grad_norm=1.0)


@pytest.mark.parametrize("kind", ["Adam", "Lion", "Adagrad"])
def test_the_dtype_of_an_offloaded_state_is_no_unknown_key(kind: str) -> None:
    config = DeepSpeedConfig.read({"optimizer": {"type": kind, "params": {"fp32_optimizer_states": True}}})
    assert "optimizer.params.fp32_optimizer_states: state is of the master" in (config.describe_left_out() or "")


def test_nothing_in_the_file() -> None:
    config = DeepSpeedConfig.read({})
    assert make_optimizer(config, nn.Linear(1, 1).named_parameters()) is None
    assert make_scheduler(config, torch.optim.SGD(nn.Linear(1, 1).parameters())) is None


def test_a_schedule_lacks_a_value() -> None:
    config = DeepSpeedConfig.read({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 3}}})
    with pytest.raises(ValueError, match="scheduler.params.total_num_steps in config for WarmupDecayLR"):
        make_scheduler(config, torch.optim.SGD(nn.Linear(1, 1).parameters()))


@pytest.mark.parametrize(("kind", "params"), [("Lamb", {"max_coeff": 5.0}), ("lion", {"betas": [0.9, 0.99]})])
def test_optimizers_that_torch_does_not_have(kind: str, params: dict[str, Any]) -> None:
    pytest.importorskip("lightning_accel.optimizers")
    optimizer = make(kind, **params)
    assert type(optimizer).__name__ == kind.capitalize()
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.0)
    for name, value in params.items():
        assert group[name] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("LRRangeTest", {"lr_range_test_min_lr": 1e-4}),
        ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2, "cycle_momentum": False}),
        ("WarmupLR", {"warmup_max_lr": 0.1}),
        ("WarmupDecayLR", {"total_num_steps": 10, "warmup_num_steps": 2, "warmup_type": "linear"}),
        ("warmupcosinelr", {"total_num_steps": 10, "warmup_num_steps": 2}),
    ],
)
def test_schedules(kind: str, params: dict[str, Any]) -> None:
    pytest.importorskip("lightning_accel.schedules")
    config = DeepSpeedConfig.read({"scheduler": {"type": kind, "params": params}})
    schedule = make_scheduler(config, torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))
    assert type(schedule).__name__.lower() == kind.lower()
