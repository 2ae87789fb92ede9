"""Rules that need no processes: windows, schedules, ranks of the environment, nested structures."""

from __future__ import annotations

import re
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from lightning_accel.manual.accumulation import Accumulation
from lightning_accel.manual.environment import Ranks, flag
from lightning_accel.manual.operations import described, first_samples, map_tensors, padded, share
from lightning_accel.manual.scheduler import PreparedScheduler
from lightning_accel.manual.watching import LoaderWatch

# -------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("steps", "batches", "closes", "corrections"),
    [
        (1, 3, "xxx xxx", [1, 1, 1]),
        (2, 4, "-x-x -x-x", [1, 1]),
        (2, 5, "-x-xx -x-xx", [1, 1, 2]),
        (3, 5, "--x-x --x-x", [1, 1.5]),
        (4, 3, "--x --x", [4 / 3]),
        (4, 1, "x x", [4]),
    ],
)
def test_windows_end_with_their_loader(steps: int, batches: int, closes: str, corrections: list[float]) -> None:
    accumulation = Accumulation(steps)
    for expected in closes.split():
        found, factors = "", []
        for batch in range(batches):
            found += "x" if accumulation.advance(ends=batch == batches - 1) else "-"
            factors += [accumulation.correction] if accumulation.sync_gradients else []
            assert accumulation.is_open is not accumulation.sync_gradients
        assert found == expected
        assert factors == pytest.approx(corrections)


def test_windows_go_on_over_loaders_without_an_end() -> None:
    accumulation = Accumulation(3)
    assert [accumulation.advance(ends=False) for _ in range(7)] == [False, False, True, False, False, True, False]
    assert accumulation.window == 3


def test_models_that_are_trained_in_turns_have_windows_of_their_own() -> None:
    accumulation = Accumulation(2)
    found = []
    for step in range(5):
        for model in "ab":
            found.append((accumulation.advance(ends=step == 4, of=model), accumulation.window, accumulation.correction))
            assert accumulation.backwards == step % 2
            accumulation.note_backward()
    assert found == [
        *[(False, 1, 1.0), (False, 2, 1.0), (True, 1, 1.0), (True, 2, 1.0)],
        *[(False, 3, 1.0), (False, 4, 1.0), (True, 3, 1.0), (True, 4, 1.0)],
        *[(True, 5, 2.0), (True, 6, 2.0)],
    ]
    accumulation.advance(ends=False, of="a")
    accumulation.advance(ends=False, of="b")
    assert not accumulation.is_over(7)  # that of a goes on
    assert accumulation.is_over(6)


class Batches:
    def __init__(self, end: bool = False) -> None:
        self.end_of_dataloader = end
        self.remainder = -1
        self.joining = None
        self.is_shadow = False


def test_the_innermost_loader_counts() -> None:
    watch, outer, inner = LoaderWatch(), Batches(), Batches(end=True)
    assert (watch.active, watch.at_end) == (None, False)
    watch.began(outer)
    watch.began(inner)
    assert watch.at_end
    watch.ended(inner)
    assert watch.active is outer
    assert not watch.at_end
    watch.began(outer)  # again, after its first iteration was given up
    watch.ended(outer)
    assert watch.active is None


# ------------------------------------------------------------------ schedules


class Steps:
    """All that a schedule asks of a prepared optimizer."""

    has_stepped = True
    step_was_skipped = False


def scheduled(name: str, times: int, **arguments: Any) -> tuple[PreparedScheduler, Accumulation, Any, Any]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **arguments)
    optimizer.step()
    accumulation, steps = Accumulation(1), Steps()
    follows = PreparedScheduler(scheduler, [steps], accumulation, times=times, with_optimizer=True)  # type: ignore[list-item]
    return follows, accumulation, steps, optimizer


@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_a_schedule_stays_at_its_end(anneal: str) -> None:
    """4 real steps of 3 ranks are 12 of a schedule of 10, whose lowest rate is that after 9."""
    scheduler, _, _, optimizer = scheduled("OneCycleLR", 3, max_lr=1.0, total_steps=10, anneal_strategy=anneal)
    for _ in range(5):
        scheduler.step()
    assert scheduler.last_epoch == 9
    alone, _, _, other = scheduled("OneCycleLR", 1, max_lr=1.0, total_steps=10, anneal_strategy=anneal)
    for _ in range(9):
        alone.step()
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] > 0


def test_a_schedule_waits_for_real_steps() -> None:
    scheduler, accumulation, steps, _ = scheduled("ExponentialLR", 2, gamma=0.5)
    rates = []
    for sync, stepped, skipped in [(1, 1, 0), (0, 1, 0), (1, 1, 1), (1, 0, 0), (1, 1, 0)]:
        accumulation.sync_gradients = bool(sync)
        steps.has_stepped, steps.step_was_skipped = bool(stepped), bool(skipped)
        scheduler.step()
        rates += scheduler.get_last_lr()
    assert rates == [0.25, 0.25, 0.25, 0.25, 0.0625]


def test_a_metric_counts_once() -> None:
    """On four ranks the rate falls with the third metric that is no better, as on one."""
    scheduler, _, _, optimizer = scheduled("ReduceLROnPlateau", 4, patience=1, factor=0.1)
    rates = []
    for loss in (1.0, 1.0, 1.0, 1.0):
        scheduler.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1])


# ---------------------------------------------------------------- environment


def environment(**values: Any) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def test_ranks_of_the_environment() -> None:
    assert Ranks.found({}) == Ranks()
    given = environment(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, MASTER_ADDR="a", MASTER_PORT=1)
    found = Ranks.found(given)
    assert (found.rank, found.ranks, found.local_rank, found.machine, found.machines) == (5, 8, 1, 1, 2)
    assert Ranks.found(environment(RANK=0, WORLD_SIZE=1)).ranks == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"WORLD_SIZE": 2}, "Expected RANK in the environment beside WORLD_SIZE=2"),
        ({"RANK": 0}, "Expected WORLD_SIZE in the environment beside RANK=0"),
        ({"RANK": 0, "WORLD_SIZE": 2}, "Expected MASTER_ADDR and MASTER_PORT"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "got RANK=2, WORLD_SIZE=2"),
        ({"RANK": 1, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 2}, "as many ranks on each machine"),
        ({"RANK": "one", "WORLD_SIZE": 3}, "Expected RANK in the environment to be a number, got 'one'"),
        ({"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, "LOCAL_RANK = RANK % LOCAL_WORLD_SIZE"),
    ],
)
def test_an_environment_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Ranks.found(environment(**given))


def test_flags() -> None:
    assert [flag("X", {"X": text}) for text in ("1", "True", "no", "")] == [True, True, False, False]
    assert not flag("X", {})
    with pytest.raises(ValueError, match="Expected X to be one of"):
        flag("X", {"X": "perhaps"})


# ----------------------------------------------------------------- structures

Pair = namedtuple("Pair", "x y")


class Output(OrderedDict[str, Any]):
    """As the outputs of transformers: with more than its items."""

    note = ""


def test_structures_stay_what_they_are() -> None:
    output = Output(a=torch.ones(2))
    output.note = "kept"
    data = {"p": Pair(torch.ones(1), [torch.zeros(3)]), "o": output, "t": (1, "text")}
    doubled = map_tensors(data, lambda tensor: tensor * 2)
    assert isinstance(doubled["p"], Pair)
    assert doubled["p"].x.tolist() == [2]
    assert doubled["o"].note == "kept"
    assert doubled["o"]["a"].tolist() == [2, 2]
    assert doubled["t"] == (1, "text")
    assert data["p"].x.tolist() == [1]
    assert described(data) == {
        "['p'][0]": "float32 [1]",
        "['p'][1][0]": "float32 [3]",
        "['o']['a']": "float32 [2]",
        "['t'][0]": "int",
        "['t'][1]": "str",
    }


def test_padding() -> None:
    tensor = torch.tensor([[1, 2], [3, 4]])
    assert padded(tensor, 3, 0, 9, first=False).tolist() == [[1, 2], [3, 4], [9, 9]]
    assert padded(tensor, 3, -1, 9, first=True).tolist() == [[9, 1, 2], [9, 3, 4]]
    assert padded(tensor, 2, 0, 9, first=True) is tensor


@pytest.mark.parametrize(
    ("length", "ranks", "pad", "expected"),
    [
        (3, 2, False, [[0, 1], [2]]),
        (3, 2, True, [[0, 1], [2, 2]]),
        (1, 3, False, [[0], [], []]),
        (1, 3, True, [[0], [0], [0]]),
        (7, 3, False, [[0, 1, 2], [3, 4], [5, 6]]),
        (7, 3, True, [[0, 1, 2], [3, 4, 6], [5, 6, 6]]),
        (4, 2, True, [[0, 1], [2, 3]]),
        (0, 2, False, [[], []]),
        (2, 1, True, [[0, 1]]),
    ],
)
def test_shares(length: int, ranks: int, pad: bool, expected: list[list[int]]) -> None:
    entries = list(range(length))
    assert [share(entries, rank, ranks, pad=pad) for rank in range(ranks)] == expected
    assert [share(tuple(entries), rank, ranks, pad=pad) for rank in range(ranks)] == [tuple(e) for e in expected]
    assert [share(torch.tensor(entries), rank, ranks, pad=pad).tolist() for rank in range(ranks)] == expected
    given = {"a": entries}
    assert [share(given, rank, ranks, pad=pad)["a"] for rank in range(ranks)] == expected
    assert given == {"a": entries}  # as it was


def test_shares_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"lengths \{'a': 1, 'b': 2\}"):
        share({"a": [1], "b": [1, 2]}, 0, 2)
    with pytest.raises(ValueError, match="at least one entry to repeat"):
        share([], 0, 2, pad=True)
    with pytest.raises(TypeError, match="got str"):
        share("text", 0, 2)
    with pytest.raises(TypeError, match="got int"):
        share(3, 0, 2)


def test_first_samples() -> None:
    found = first_samples({"x": torch.arange(4), "y": (torch.arange(6).view(3, 2),)}, 2)
    assert found["x"].tolist() == [0, 1]
    assert found["y"][0].tolist() == [[0, 1], [2, 3]]
