"""LAMB: its formula, and the result of a single process under every row."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.toys import EXACT, ROW_NAMES, Net, build, compare, started, train
from lightning_accel.core import register_elementwise
from lightning_accel.optimizers import Lamb
from rows import everyday


def lamb(parameters: Any) -> Lamb:
    return Lamb(parameters, lr=0.02, weight_decay=0.1)


class Cut(Lamb):
    """Declared elementwise, which LAMB is not."""


def cut(parameters: Any) -> Lamb:
    return Cut(parameters, lr=0.02, weight_decay=0.1)


def by_hand(values: Tensor, gradients: list[Tensor], **settings: Any) -> tuple[Tensor, list[float]]:
    """The formula, step by step in double precision; and the trust ratios."""
    given = {"bias_correction": True, "eps": 1e-8, "eps_inside_sqrt": False, "weight_decay": 0.0}
    given |= {"max_coeff": 10.0, "min_coeff": 0.01} | settings
    m, v, ratios = torch.zeros_like(values), torch.zeros_like(values), []
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        root = (v + given["eps"]) ** 0.5 if given["eps_inside_sqrt"] else v**0.5 + given["eps"]
        u = m / root + given["weight_decay"] * values
        ratio = 1.0
        if values.norm() and u.norm():
            ratio = min(max(float(values.norm() / u.norm()), given["min_coeff"]), given["max_coeff"])
        ratios.append(ratio)
        length = 0.1 * (math.sqrt(1 - 0.999**t) / (1 - 0.9**t) if given["bias_correction"] else 1.0)
        values = values - length * ratio * u
    return values, ratios


@pytest.mark.parametrize(
    ("scale", "settings", "ratios"),
    [
        (1.0, {}, (0.1, 1.0)),
        (1.0, {"weight_decay": 0.3, "bias_correction": False}, (0.1, 1.0)),
        (1.0, {"eps": 0.01, "eps_inside_sqrt": True}, (0.1, 10.0)),
        (1e-3, {"min_coeff": 0.05}, (0.05, 0.05)),
        (1e3, {"max_coeff": 4}, (4, 4)),
        (0.0, {}, (0.01, 1.0)),  # ratio 1 in the first step
    ],
)
def test_steps_follow_the_formula(scale: float, settings: dict[str, Any], ratios: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator, dtype=torch.float64) * scale
    gradients = [torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(5)]
    expected, had = by_hand(start, gradients, **settings)
    assert ratios[0] <= min(had) <= max(had) <= ratios[1]
    parameter = nn.Parameter(start.clone())
    optimizer = Lamb([parameter], lr=torch.tensor(0.1, dtype=torch.float64), **settings)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        assert optimizer.step(lambda: 3.0) == 3.0
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)
    assert {key: value.shape for key, value in optimizer.state[parameter].items()} == {
        "step": (),
        "exp_avg": (5, 7),
        "exp_avg_sq": (5, 7),
    }


def compare_without_warnings(row: str) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return compare(Net, row, lamb, steps=20, bucket_cap_mb=0.001)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_every_row_gives_the_single_process_result(ranks3: Any, row: str) -> None:
    assert max(ranks3.run(compare_without_warnings, row)) < EXACT


def compare_cut() -> float:
    register_elementwise(Cut)
    return compare(Net, "zero2", cut, steps=20, bucket_cap_mb=0.001)


def test_norms_of_pieces_would_be_noticed(ranks3: Any) -> None:
    assert max(ranks3.run(compare_cut)) > 1e-3


def compare_grouped(row: str) -> float:
    def groups(parameters: Any) -> Lamb:
        first, *rest = list(parameters)
        of_first: dict[str, Any] = {"params": [first], "lr": 0.05, "max_coeff": 0.2}
        return Lamb([of_first, {"params": rest}], lr=0.01, betas=(0.8, 0.95))

    return compare(Net, row, groups, steps=10, accumulate=2)


def test_groups_and_accumulation(ranks2: Any) -> None:
    assert max(ranks2.run(compare_grouped, "zero2")) < EXACT


def compare_offloaded() -> float:
    return compare(Net, "zero2", lamb, steps=5, offload="optimizer")


def test_offloaded_state(ranks2: Any) -> None:
    assert max(ranks2.run(compare_offloaded)) < EXACT


def moved_state() -> tuple[list[str], float]:
    """What zero2's state holds, and how it differs from ddp's once plain torch has loaded it."""
    engine, optimizer = started("zero2", Net, lamb)
    train(engine, optimizer, 3)
    saved = optimizer.state_dict()
    engine2, optimizer2 = started("ddp", Net, lamb)
    train(engine2, optimizer2, 3)
    expected = optimizer2.state_dict()["state"]
    if not saved:
        return [], 0.0
    names = sorted({f"{key} {value.dtype}" for entry in saved["state"].values() for key, value in entry.items()})
    alone = lamb(build(Net).parameters())
    alone.load_state_dict(saved)
    loaded = alone.state_dict()["state"]
    assert loaded.keys() == expected.keys()
    return names, max(float((loaded[i][key] - b).abs().max()) for i in expected for key, b in expected[i].items())


def test_state_is_by_whole_parameters_and_the_same_on_all_rows(ranks2: Any) -> None:
    names, error = ranks2.run(moved_state)[0]
    assert names == ["exp_avg torch.float64", "exp_avg_sq torch.float64", "step torch.float32"]
    assert error < EXACT


def test_norms_of_large_tensors_are_precise() -> None:
    parameter = nn.Parameter(torch.randn(2**22, generator=torch.Generator().manual_seed(0)))
    start = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    Lamb([parameter], lr=0.1, bias_correction=False, eps=0.0).step()
    # The direction is the same for all: 0.1 / sqrt(0.001).
    ratio = start.double().norm() / (math.sqrt(10) * 2**11)
    length = (start - parameter.detach()).double().mean()
    assert float(length / (0.1 * math.sqrt(10) * ratio)) == pytest.approx(1, abs=1e-6)


def many(device: str) -> list[Tensor]:
    """Parameters after some steps, of which one has had fewer than the rest."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (1, 3, 4)]
    parameters = [nn.Parameter(value.to(device)) for value in values]
    optimizer = Lamb(parameters, lr=0.1, weight_decay=0.1)
    for step in range(4):
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = None if step == 0 and parameter is parameters[1] else gradient.to(device)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in parameters]


def by_count(parameters: list[Tensor], key: Callable[[Tensor], Any]) -> list[list[Tensor]]:
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(key(parameter), []).append(parameter)
    return list(groups.values())


def test_tensors_by_one_call_and_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one = many("cpu")
    calls = []
    update = Lamb._update

    def noted(self: Lamb, parameters: list[Tensor], group: dict[str, Any]) -> None:
        calls.append(len(parameters))
        update(self, parameters, group)

    monkeypatch.setattr(Lamb, "_update", noted)
    monkeypatch.setattr("lightning_accel.optimizers.batched.batches", by_count)
    monkeypatch.setattr("lightning_accel.optimizers.lamb._norms", lambda tensors: torch.stack(by_foreach(tensors)))
    torch.testing.assert_close(many("cpu"), one_by_one, rtol=1e-12, atol=0)
    assert calls == [2, 2, 1, 2, 1, 2, 1]


def by_foreach(tensors: list[Tensor]) -> Any:
    return torch._foreach_norm(tensors, 2, dtype=torch.float64)


@pytest.mark.cuda
def test_on_a_cuda_device() -> None:
    torch.testing.assert_close(many("cuda"), many("cpu"), rtol=1e-12, atol=0)


def test_a_parameter_without_gradient_or_elements_is_left_alone() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)] + [nn.Parameter(torch.ones(0))]
    parameters[0].grad, parameters[2].grad = torch.ones(2), torch.ones(0)
    optimizer = Lamb(parameters)
    optimizer.step()
    assert parameters[1] not in optimizer.state
    assert torch.equal(parameters[1], torch.ones(2))
    assert not torch.equal(parameters[0], torch.ones(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr to be a number of at least 0, got -1"),
        ({"lr": "auto"}, "lr to be a number of at least 0, got 'auto'"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] to be below 1, got 1.0"),
        ({"betas": 0.9}, "betas to be two numbers, got 0.9"),
        ({"eps": math.nan}, "eps to be a number of at least 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"min_coeff": 1.0, "max_coeff": 0.5}, "min_coeff to be at most max_coeff, got 1.0 and 0.5"),
        ({"max_grad_norm": 1.0}, "Expected max_grad_norm=0, got 1.0.*gradient_clip_val"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lamb([nn.Parameter(torch.ones(2))], **settings)
    with pytest.raises(ValueError, match=message):  # of one group
        Lamb([{"params": [nn.Parameter(torch.ones(2))], **settings}])


def test_bad_tensors() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="Expected real parameters, got one of torch.complex64"):
        Lamb([parameter]).step()
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([0])).sum().backward()
    with pytest.raises(ValueError, match="Expected dense gradients"):
        Lamb(embedding.parameters()).step()
