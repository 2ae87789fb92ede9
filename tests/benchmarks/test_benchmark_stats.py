"""The arithmetic of the benchmark, and that its loss check tells a wrong peer from a right one."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.config import Config
from benchmarks.models import STEPS_IN_BANK, Batches, build_model, build_optimizer
from benchmarks.stats import TOLERANCES, Spread, check_losses, ratios, visiting_order

TOLERANCE = TOLERANCES["32-true"]


def test_spread_of_known_values() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 1.0, 5.0, 2.0, 4.0)


def test_spread_of_one_value_is_that_value() -> None:
    assert Spread.of([2.5]) == Spread(2.5, 2.5, 2.5, 2.5, 2.5)


def test_ratios_pair_up_rounds() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="zip"):
        ratios([2.0], [1.0, 3.0])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_round_visits_every_peer_and_none_is_always_first(count: int) -> None:
    orders = [visiting_order(count, index) for index in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count > 2:
        assert len({order[0] for order in orders}) == count
        assert len({(order[0], order[1]) for order in orders}) > count  # neighbours change too


def test_losses_are_compared_as_far_as_both_go() -> None:
    check = check_losses([[2.0, 4.0, 1e9]], [2.0, 4.0 * (1 + 1e-3)], tolerance=1e-2)
    assert check.steps == 2
    assert check.difference == pytest.approx(1e-3, rel=2e-3)
    assert check.passed


def test_the_worst_of_several_trajectories_counts() -> None:
    check = check_losses([[1.0], [1.5]], [1.0], tolerance=0.1)
    assert check.difference == pytest.approx(0.5)
    assert not check.passed


@pytest.mark.parametrize("losses", [[], [[]], [[1.0, math.nan]]])
def test_nothing_and_not_a_number_are_wrong(losses: list[list[float]]) -> None:
    assert not check_losses(losses, [1.0, 1.0], TOLERANCE).passed


def _train(steps: int, spoil: Callable[[nn.Module], None] = lambda module: None, pieces: int = 1) -> list[float]:
    """Losses of one process on the global batch, in `pieces` micro-batches, with `spoil` applied to each gradient."""
    config = Config(model="gpt-tiny")
    module, batches = build_model(config), Batches(config)
    optimizer = build_optimizer(module.parameters(), config)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        ((batch,),) = batches.of_all_ranks(step)
        for piece in batch.chunk(pieces):
            loss = module(piece) / pieces
            loss.backward()
            total += loss.item()
        spoil(module)
        optimizer.step()
        losses.append(total)
    return losses


def _scale(factor: float) -> Callable[[nn.Module], None]:
    def spoil(module: nn.Module) -> None:
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(factor)

    return spoil


def _drop_one_bias(module: nn.Module) -> None:
    module.get_submodule("blocks.1.up").bias.grad = None


@pytest.fixture(scope="module")
def expected() -> list[float]:
    torch.set_num_threads(1)
    return _train(6)


def test_another_order_of_summation_passes(expected: list[float]) -> None:
    check = check_losses([_train(6, pieces=4)], expected, TOLERANCE)
    assert check.passed
    assert check.difference < TOLERANCE / 2


@pytest.mark.parametrize(
    "spoil",
    [pytest.param(_scale(2.0), id="sum, not mean"), pytest.param(_scale(0.5), id="mean, twice"), _drop_one_bias],
)
def test_wrong_gradients_do_not_pass(expected: list[float], spoil: Callable[[nn.Module], None]) -> None:
    assert not check_losses([_train(6, spoil)], expected, TOLERANCE).passed


def test_ranks_together_see_the_global_batch() -> None:
    config = Config(model="gpt-tiny", ranks=3, accumulate=2)
    step = STEPS_IN_BANK + 1  # the bank goes round
    by_rank = [Batches(Config(model="gpt-tiny", ranks=3, accumulate=2, rank=rank)).of_rank(step) for rank in range(3)]
    together = Batches(config).of_all_ranks(1)
    assert len(together) == 2
    for micro_batch in range(2):
        (whole,) = together[micro_batch]
        assert torch.equal(whole, torch.cat([batches[micro_batch][0] for batches in by_rank]))


def test_the_large_model_has_about_23_million_parameters() -> None:
    with torch.device("meta"):
        module = build_model(Config())
    assert sum(parameter.numel() for parameter in module.parameters()) == pytest.approx(23e6, rel=0.02)


def test_a_loss_near_zero_is_held_to_a_tenth_of_the_first() -> None:
    expected = [2.5, 0.2, 1.57080e-4]
    assert check_losses([[2.5, 0.2, 1.57077e-4]], expected, TOLERANCE).passed  # 2e-5 of it: what rounding leaves
    assert not check_losses([[2.5, 0.2, 1.6e-4]], expected, TOLERANCE).passed
