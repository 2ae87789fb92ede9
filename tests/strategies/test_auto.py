"""accel_auto: the row comes from a plan."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from models import FLOAT64, Data, Regression, assert_close, loader, trainer, values
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from harness import Ranks
from lightning_accel.planning import plan
from lightning_accel.strategies import AccelAutoStrategy


class Wide(Regression):
    """Large enough for the rows to differ in more than padding."""

    def __init__(self, *, lr: float = 0.02) -> None:
        super().__init__(lr=lr)
        self.net.blocks = torch.nn.ModuleList(torch.nn.Linear(500, 500, dtype=torch.float64) for _ in range(6))
        self.net.first = torch.nn.Linear(5, 500, dtype=torch.float64)
        self.net.last = torch.nn.Linear(500, 3, dtype=torch.float64)


def batch() -> Any:
    return next(iter(loader()))


def fit(module: Regression, strategy: Any, data: Any = None) -> tuple[str, list[str], list[str], dict[str, Tensor]]:
    """The row, lines and warnings of a fit, and what was trained."""
    logging.disable(logging.NOTSET)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            used = trainer(strategy)
            used.fit(module, datamodule=Data() if data is None else None, train_dataloaders=data)
    finally:
        log.removeHandler(handler)
    told = [line for line in lines if line.startswith("accel_auto")]
    warned = [str(w.message) for w in caught if str(w.message).startswith("accel_auto")]
    return used.strategy.row.name, told, warned, values(module)


def chosen(memory: int) -> tuple[str, list[str], list[str]]:
    return fit(Wide(), AccelAutoStrategy(memory=memory))[:3]


def test_the_row_is_what_the_plan_says(ranks2: Ranks) -> None:
    rows = ("zero2", "fsdp_partial", "fsdp")
    _, x, y = batch()
    shared = [torch.arange(4), x[:4], y[:4]]  # what each of two ranks gets
    planned = plan(Wide(), batch=shared, ranks=2, rows=rows, checkpointing=False)
    peaks = {row.row: row.peak_bytes for row in planned.rows}
    assert peaks["fsdp"] < peaks["fsdp_partial"] < peaks["zero2"]
    for memory, expected in (
        (2 * peaks["zero2"], "fsdp_partial"),
        (peaks["fsdp_partial"], "fsdp_partial"),
        (peaks["fsdp_partial"] - 1, "fsdp"),
    ):
        first, second = ranks2.run(chosen, memory)
        assert first[0] == second[0] == expected
        assert first[1] == [f"accel_auto takes {plan_of(planned, memory).why()}"]
        assert (first[2], second[1], second[2]) == ([], [], [])
    first, second = ranks2.run(chosen, peaks["fsdp"] - 1)
    assert first[0] == second[0] == "fsdp"
    (warned,) = first[2]
    assert "No row fits" in warned


def plan_of(planned: Any, memory: int) -> Any:
    return type(planned)(**{**vars(planned), "memory": memory})


def by_name(strategy: str) -> tuple[str, dict[str, Tensor]]:
    torch.manual_seed(3)
    row, _, _, trained = fit(Regression(), strategy)
    return row, trained


def test_it_trains_as_the_row_that_it_takes(ranks2: Ranks) -> None:
    row, trained = ranks2.run(by_name, "accel_auto")[0]
    assert row in ("zero2", "fsdp_partial")
    assert_close(trained, ranks2.run(by_name, f"accel_{row}")[0][1], FLOAT64)


class LooksAtValues(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert loss.item() >= 0
        return loss


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from (batch() for _ in range(2))


def without_a_plan(kind: str) -> tuple[str, list[str]]:
    if kind == "values":
        row, told, warned, _ = fit(LooksAtValues(), "accel_auto")
    else:
        row, told, warned, _ = fit(Regression(), "accel_auto", DataLoader(Stream(), batch_size=None))
    assert told == []
    return row, warned


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("values", "needs no values of tensors"), ("stream", "that can be indexed")],
)
def test_where_there_is_no_plan_the_smallest_row_is_taken(ranks2: Ranks, kind: str, reason: str) -> None:
    (row, (warned,)), (other, nothing) = ranks2.run(without_a_plan, kind)
    assert row == other == "fsdp"
    assert nothing == []
    assert warned.startswith("accel_auto takes accel_fsdp, which needs least memory, as it cannot plan for this model:")
    assert reason in warned


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="Expected no offload with accel_auto"):
        AccelAutoStrategy(offload="optimizer")
    with pytest.raises(ValueError, match="Expected a size such as"):
        AccelAutoStrategy(memory="all of it")
