"""The harness itself: if a test in here fails, believe no multi-process test."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from harness import Ranks, RanksError


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two ranks of this module's own with little patience, for tests that kill them."""
    with Ranks(2, timeout=60.0, grace=3.0) as ranks:
        yield ranks


def whoami(offset: int = 0, *, scale: int = 1) -> int:
    return dist.get_rank() * scale + offset


def process_id() -> int:
    return os.getpid()


def all_reduced() -> float:
    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value)
    return value.item()


def fail_on(rank: int, message: str) -> None:
    if dist.get_rank() == rank:
        raise ValueError(message)


def fail_everywhere() -> None:
    raise ValueError(f"no {dist.get_rank()}")


def leave_the_others_in_a_collective() -> None:
    if dist.get_rank() == 1:
        raise ValueError("before the collective")
    dist.barrier()


def leave_the_others_asleep() -> None:
    if dist.get_rank() == 1:
        raise ValueError("while the other sleeps")
    time.sleep(1000)


def compare() -> None:
    left, right = 12, 34
    assert left == right


def die_and_leave_a_child() -> None:
    if os.fork() == 0:  # holds the worker's connection open
        time.sleep(1000)
    die(by_signal=False)


def die(by_signal: bool) -> None:
    if dist.get_rank() == 1:
        if by_signal:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)
    time.sleep(1000)


def leave_a_mess() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    os.environ["LEFT_BEHIND"] = "1"
    os.environ["RANK"] = "7"
    os.chdir("/")
    warnings.simplefilter("error")
    dist.new_group([0])
    random.random()
    torch.rand(3)


def look_around() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        os.environ.get("LEFT_BEHIND"),
        int(os.environ["RANK"]) - dist.get_rank(),
        os.getcwd(),
        [(action, category.__name__) for action, _, category, _, _ in warnings.filters],
        random.random(),
        torch.rand(3).tolist(),
    )


def destroy_group() -> None:
    dist.destroy_process_group()


def join_by_environment() -> float:
    dist.destroy_process_group()
    dist.init_process_group("gloo")
    return all_reduced()


def zoo() -> dict[str, object]:
    weight = torch.nn.Parameter(torch.arange(4.0))
    return {
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]).conj(),
        "empty": torch.empty(0, 3, dtype=torch.int8),
        "in a graph": weight * 2,
        "parameter": weight,
        "scalar": torch.tensor(5),
        "transposed view": torch.arange(1000).reshape(500, 2)[:3].t(),
    }


def step(model: torch.nn.Module) -> torch.nn.Module:
    model(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return model


def unpicklable() -> object:
    return lambda: None


def warn_and_log() -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

    warnings.warn("a plain warning", stacklevel=1)
    rank_zero_warn("a Lightning warning")
    rank_zero_info("a Lightning note")
    print("straight to stderr", file=sys.stderr)


def lightning_environment() -> tuple[object, ...]:
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    fabric.launch()
    return type(fabric.strategy.cluster_environment).__name__, os.getpid(), fabric.global_rank, fabric.world_size


def test_results_come_by_rank(ranks: Ranks) -> None:
    assert ranks.run(whoami) == [0, 1]
    assert ranks.run(whoami, 5, scale=10) == [5, 15]


def test_ranks_form_a_group(ranks: Ranks) -> None:
    assert ranks.run(all_reduced) == [3.0, 3.0]


def test_processes_live_on_between_runs(ranks: Ranks) -> None:
    first = ranks.run(process_id)
    assert ranks.run(process_id) == first
    assert os.getpid() not in first
    assert len(set(first)) == 2


def test_error_shows_the_failing_rank_and_the_rest(ranks: Ranks) -> None:
    with pytest.raises(RanksError) as caught:
        ranks.run(fail_on, 1, "on purpose")
    message = str(caught.value)
    assert "rank 1 of 2 raised ValueError: on purpose" in message
    assert "test_harness.fail_on" in message
    assert "raise ValueError(message)" in message
    assert "rank 0 returned" in message
    assert ranks.run(all_reduced) == [3.0, 3.0]


def test_peers_in_a_collective_are_not_left_hanging(ranks: Ranks) -> None:
    start = time.monotonic()
    errors = ranks.run_expecting_error(leave_the_others_in_a_collective)
    assert errors[0] is not None  # whatever gloo calls a closed connection
    assert errors[1] == ("ValueError", "before the collective")
    assert time.monotonic() - start < 30
    assert ranks.run(all_reduced) == [3.0, 3.0]


@pytest.mark.matrix
def test_peers_that_never_return_are_killed(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    before = ranks.run(process_id)
    with pytest.raises(RanksError, match="(?s)rank 1 of 2 raised ValueError.*rank 0 did not finish in time"):
        ranks.run(leave_the_others_asleep)
    assert "leave_the_others_asleep" in capfd.readouterr().err  # where it was stuck
    assert not set(ranks.run(process_id)) & set(before)


@pytest.mark.matrix
def test_a_stuck_rank_is_an_error_when_an_error_is_expected(ranks: Ranks) -> None:
    with pytest.raises(RanksError, match="did not finish in time"):
        ranks.run_expecting_error(leave_the_others_asleep)


@pytest.mark.matrix
def test_failed_assertion_shows_its_values(ranks: Ranks) -> None:
    assert ranks.run_expecting_error(compare) == [("AssertionError", "assert 12 == 34")] * 2


@pytest.mark.matrix
def test_death_is_noticed_behind_a_living_child(ranks: Ranks) -> None:
    start = time.monotonic()
    with pytest.raises(RanksError, match="rank 1 of 2 exited with code 7"):
        ranks.run(die_and_leave_a_child)
    assert time.monotonic() - start < 30  # starting included


@pytest.mark.parametrize(("by_signal", "how"), [(False, "exited with code 7"), (True, "was killed by SIGKILL")])
def test_death_is_noticed_at_once(ranks: Ranks, by_signal: bool, how: str) -> None:
    ranks.run(whoami)
    start = time.monotonic()
    with pytest.raises(RanksError, match=f"rank 1 of 2 {how}"):
        ranks.run(die, by_signal)
    assert time.monotonic() - start < 10
    assert ranks.run(all_reduced) == [3.0, 3.0]


def test_expected_errors_come_by_rank(ranks: Ranks) -> None:
    before = ranks.run(process_id)
    assert ranks.run_expecting_error(fail_everywhere) == [("ValueError", "no 0"), ("ValueError", "no 1")]
    assert ranks.run_expecting_error(fail_on, 0, "just me") == [("ValueError", "just me"), None]
    assert ranks.run(process_id) == before


def test_no_error_where_one_is_expected_is_an_error(ranks: Ranks) -> None:
    with pytest.raises(RanksError, match="Expected test_harness.whoami to raise on at least one rank"):
        ranks.run_expecting_error(whoami)


def test_a_run_starts_as_a_fresh_process_would(ranks: Ranks) -> None:
    before = ranks.run(look_around)
    ranks.run(leave_a_mess)
    assert ranks.run(look_around) == before


def test_the_group_survives_code_that_destroys_it(ranks: Ranks) -> None:
    ranks.run(destroy_group)
    for _ in range(2):
        assert ranks.run(join_by_environment) == [3.0, 3.0]


def test_tensors_come_back_plain(ranks: Ranks) -> None:
    expected = zoo()
    for result in ranks.run(zoo):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert isinstance(value, torch.Tensor)
            torch.testing.assert_close(result[name], value.detach(), rtol=0, atol=0, msg=name)
        assert isinstance(result["parameter"], torch.nn.Parameter)
        assert not result["in a graph"].requires_grad
        assert result["transposed view"].untyped_storage().nbytes() == 6 * 8


def test_modules_go_out_and_come_back(ranks: Ranks) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    first, second = ranks.run(step, model)
    assert first[1].weight is first[0].weight
    assert not torch.equal(first[0].weight, model[0].weight)
    assert torch.equal(first[0].weight, second[0].weight)


def test_what_cannot_be_pickled_is_refused(ranks: Ranks) -> None:
    with pytest.raises(TypeError, match="Expected a module-level function"):
        ranks.run(lambda: None)
    assert all(ranks.run_expecting_error(unpicklable))


def test_ranks_keep_quiet_but_for_stderr(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    ranks.run(warn_and_log)
    streams = capfd.readouterr()
    assert streams.out == ""
    assert streams.err == "straight to stderr\n" * 2


def test_lightning_launches_no_processes(ranks: Ranks) -> None:
    processes = ranks.run(process_id)
    expected = [("TorchElasticEnvironment", process, rank, 2) for rank, process in enumerate(processes)]
    assert ranks.run(lightning_environment) == expected


@pytest.mark.matrix
def test_close_ends_every_process(ranks: Ranks) -> None:
    processes = ranks.run(process_id)
    ranks.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert ranks.run(whoami) == [0, 1]


@pytest.mark.matrix
@pytest.mark.parametrize("world", [1, 2, 3, 4], indirect=True)
def test_worlds_of_every_size(world: Ranks) -> None:
    size = world.world_size
    assert world.run(whoami) == list(range(size))
    assert world.run(all_reduced) == [size * (size + 1) / 2] * size
