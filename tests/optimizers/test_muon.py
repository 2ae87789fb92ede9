"""MuonWithAuxAdam: torch's Muon and Adam, as one optimizer, under every row."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from core.toys import ROW_NAMES, Net, compare
from lightning_accel.optimizers import MuonWithAuxAdam
from rows import everyday


def groups(parameters: Any, **adam: Any) -> list[dict[str, Any]]:
    given = list(parameters)
    return [
        {"params": [p for p in given if p.dim() == 2], "use_muon": True, "lr": 0.02, "weight_decay": 0.1},
        {"params": [p for p in given if p.dim() != 2], "use_muon": False, "lr": 0.01, **adam},
    ]


def train(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    for step in range(4):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        module(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("decoupled", "kind"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_it_is_both_of_torchs(decoupled: bool, kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 4)
    other = copy.deepcopy(module)
    optimizer = MuonWithAuxAdam(groups(module.parameters(), adam_w_mode=decoupled, weight_decay=0.3))
    train(module, [optimizer])
    muon = torch.optim.Muon([other.weight], lr=0.02, weight_decay=0.1)
    train(other, [muon, kind([other.bias], lr=0.01, weight_decay=0.3)])  # type: ignore[call-arg]
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert set(optimizer.state[module.weight]) == {"momentum_buffer"}
    assert set(optimizer.state[module.bias]) == {"step", "exp_avg", "exp_avg_sq"}


def test_its_state_loads() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 4)
    optimizer = MuonWithAuxAdam(groups(module.parameters()))
    train(module, [optimizer])
    other = copy.deepcopy(module)
    again = MuonWithAuxAdam(groups(other.parameters()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(module, [optimizer])
    train(other, [again])
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)


def muon(parameters: Any) -> MuonWithAuxAdam:
    return MuonWithAuxAdam(groups(parameters))


def compare_without_warnings(row: str) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return compare(Net, row, muon, steps=5, bucket_cap_mb=0.001)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_every_row_gives_the_single_process_result(ranks3: Any, row: str) -> None:
    """Muon rounds to bfloat16 within, where a last-bit difference of a gradient may tip a value."""
    assert max(ranks3.run(compare_without_warnings, row)) < 2e-3


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": 0.1}, "to say use_muon=True or use_muon=False"),
        ({"use_muon": True}, "only supports 2D parameters"),
    ],
)
def test_bad_groups(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonWithAuxAdam([{"params": [nn.Parameter(torch.ones(2))], **group}])
