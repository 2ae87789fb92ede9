"""Where the time of steps goes."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from torch import nn

from core.toys import Net, adamw, build, data, mse, my_share, prepared, sgd, train
from harness import Ranks
from lightning_accel.core.times import BETWEEN, OTHER, PHASES, TOTAL, StepTimes, StopWatch, describe, slowest
from lightning_accel.core.watching import BACKWARD, FORWARD, GRADIENTS, PARAMETERS, UPDATE
from rows import everyday

CPU = torch.device("cpu")


class Clock:
    """Goes on by one second whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1
        return self.now


@pytest.fixture
def watch() -> StopWatch:
    found = StopWatch(CPU)
    found._now = Clock()
    return found


def step(watch: StopWatch) -> None:
    with watch.within(FORWARD), watch.within(PARAMETERS):
        pass
    with watch.within(BACKWARD), watch.within(GRADIENTS):
        pass
    watch.begin_update()
    watch.end_step()


def test_each_moment_belongs_to_one_phase(watch: StopWatch) -> None:
    step(watch)
    step(watch)
    first, second = watch.take()
    # Before and after the wait; and between forward and backward, and between backward and the update.
    assert first == {FORWARD: 2e3, PARAMETERS: 1e3, BACKWARD: 2e3, GRADIENTS: 1e3, UPDATE: 1e3, OTHER: 2e3, BETWEEN: 0}
    assert second == {**first, BETWEEN: 1e3}
    assert watch.take() == []


def test_evaluation_is_between_steps(watch: StopWatch) -> None:
    step(watch)
    with torch.no_grad(), watch.within(FORWARD), watch.within(PARAMETERS):
        pass
    step(watch)
    first, second = watch.take()
    assert second == {**first, BETWEEN: 1e3}


def test_steps_within_a_forward_and_updates_that_fail(watch: StopWatch) -> None:
    with watch.within(FORWARD):
        for _ in range(2):
            with watch.within(BACKWARD):
                pass
            watch.begin_update()
            watch.begin_update()  # a closure that is evaluated twice
            watch.end_step()
        watch.begin_update()  # and fails
    for found in watch.take():
        assert (found[BACKWARD], found[UPDATE], found[BETWEEN]) == (1e3, 1e3, 0.0)
    step(watch)
    (third,) = watch.take()
    assert third[UPDATE] == 2e3


class Event:
    """As torch's, of a stream on which each takes a second."""

    now = 0
    is_waited_for = 0

    def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
        assert enable_timing
        assert device.type == "cuda"

    def record(self) -> None:
        type(self).now += 1
        self.when = self.now

    def synchronize(self) -> None:
        type(self).is_waited_for += 1

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.when - self.when)


def test_on_a_stream_events_tell_one_step_later(watch: StopWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Event", Event)
    on_stream = StopWatch(torch.device("cuda"))
    for count in range(3):
        step(on_stream)
        step(watch)
        assert Event.is_waited_for == count
    assert on_stream.take() == watch.take()
    assert Event.is_waited_for == 3


def test_means_add_up_and_the_slowest_waits_least() -> None:
    def times(rank: int, waited: float) -> StepTimes:
        phases = dict.fromkeys(PHASES, 1.0)
        return StepTimes.of(rank, [{**phases, GRADIENTS: waited, UPDATE: 20 - waited}] * 2)

    ranks = [times(0, 6.0), times(1, 2.0), times(2, 9.0)]
    assert slowest(ranks).rank == 1
    assert ranks[0].mean_ms[TOTAL] == 25.0 == sum(ranks[0].mean_ms[phase] for phase in PHASES)
    text = "\n".join(describe(ranks[0], ranks[1]))
    assert "ms in each of 2 steps" in text
    assert "rank 1, the slowest" in text
    assert text.count("25.00") == 4
    assert "slowest" not in "\n".join(describe(ranks[0], None))


def timed(row: str) -> Any:
    engine, optimizer = prepared(row)
    train(engine, optimizer, 1)
    untimed = engine.report(all_ranks=True)
    hooks = len(engine.module._forward_hooks)
    engine.phases.time_steps()
    train(engine, optimizer, 3)
    report = engine.report(all_ranks=True)
    again = engine.report()
    engine.phases.time_steps(False)
    train(engine, optimizer, 1)
    return untimed, report, again, engine.report(), len(engine.module._forward_hooks) - hooks


@pytest.mark.parametrize("row", everyday(["ddp", "zero1", "zero2", "fsdp"]))
def test_the_report_has_times_if_asked(ranks2: Ranks, row: str) -> None:
    for rank, (untimed, report, again, after, hooks) in enumerate(ranks2.run(timed, row)):
        assert untimed.times is None
        assert after.times is None
        assert again.times is None, "there was no step since the last one"
        assert hooks == 0
        times = report.times
        assert (times.rank, times.steps) == (rank, 3)
        for phase in (FORWARD, BACKWARD, GRADIENTS, UPDATE, TOTAL):
            assert times.mean_ms[phase] > 0
            assert times.median_ms[phase] > 0
        assert (times.mean_ms[PARAMETERS] > 0) == (row != "ddp")
        assert sum(times.mean_ms[phase] for phase in PHASES) == pytest.approx(times.mean_ms[TOTAL])
        assert report.slowest.rank in (0, 1)
        assert "gradients waited for" in str(report)
        assert "gradients waited for" not in str(untimed)
        assert json.loads(json.dumps(report.to_dict()))["times"]["steps"] == 3


def failing() -> tuple[int, bool]:
    class Failing(Net):
        fails = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fails:
                raise KeyError("x")
            return super().forward(x)

    engine, optimizer = prepared("zero2", Failing, sgd)
    engine.phases.time_steps()
    engine.module.fails = True  # type: ignore[assignment]
    x, y = data(1, 2)
    with contextlib.suppress(KeyError):
        mse(engine.module, my_share(x[0]), my_share(y[0]))
    engine.module.fails = False  # type: ignore[assignment]
    train(engine, optimizer, 2)
    times = engine.report().times
    assert times is not None
    steps, found = times.steps, times.mean_ms[UPDATE] > 0
    engine.close()
    assert not engine.module._forward_hooks
    return steps, found


def test_a_forward_that_fails_leaves_times_in_order(ranks2: Ranks) -> None:
    assert ranks2.run(failing) == [(2, True)] * 2


def test_nothing_hangs_on_a_model_that_nobody_watches(ranks2: Ranks) -> None:
    for hooks in ranks2.run(hooks_of_a_replicated_model):
        assert hooks == 0


def hooks_of_a_replicated_model() -> int:
    module: nn.Module = build(Net)
    from lightning_accel.core import Engine

    engine = Engine(module, "zero2")
    engine.add_optimizer(adamw(module.parameters()))
    return len(module._forward_hooks) + len(module._forward_pre_hooks)
