"""What the ranks tell each other through an Accelerator."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness import Ranks
from lightning_accel import Accelerator


def tables() -> dict[str, Any]:
    """The results of operations on what the ranks have; rank r has r + 1 where nothing else is said."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    mine = torch.tensor([rank + 1, 10 * (rank + 1)])
    kept = mine.clone()
    found: dict[str, Any] = {
        reduction: accelerator.reduce(mine, reduction).tolist() for reduction in ("sum", "mean", "max", "min", "none")
    }
    found["scaled"] = accelerator.reduce({"x": mine.double()}, "sum", scale=0.5)["x"].tolist()
    found["flags"] = accelerator.reduce(torch.tensor([rank == 0, True]), "min").tolist()
    found["gathered"] = accelerator.gather(mine).tolist()
    found["numbers"] = accelerator.gather(torch.tensor(float(rank), dtype=torch.bfloat16)).tolist()
    found["nested"] = accelerator.gather({"a": [torch.full((1, 2), rank)], "b": (torch.tensor([rank > 0]),)})
    found["empty"] = list(accelerator.gather(torch.empty(0, 3)).shape)
    found["complex"] = accelerator.gather(torch.tensor([complex(rank, 1)])).tolist()
    found["objects"] = accelerator.gather_object([f"rank {rank}"] * (rank + 1))
    found["single objects"] = accelerator.gather_object({"rank": rank})
    found["padded"] = accelerator.gather(accelerator.pad_across_processes(torch.full((rank + 1,), rank), pad_index=9))
    first = accelerator.pad_across_processes(torch.full((1, rank + 1), rank), dim=-1, pad_index=9, pad_first=True)
    found["padded first"] = accelerator.gather(first).tolist()
    last = accelerator.num_processes - 1
    found["broadcast"] = accelerator.broadcast(mine, from_process=last).tolist()
    found["broadcast objects"] = accelerator.broadcast_object_list([rank, {"of": rank}], from_process=last)
    with accelerator.split_between_processes(["a", "b", "c"]) as share:
        found["share"] = share
    assert torch.equal(mine, kept)
    found["triggers"] = [accelerator.check_trigger()]
    if accelerator.is_last_process:
        accelerator.set_trigger()
    found["triggers"] += [accelerator.check_trigger(), accelerator.check_trigger()]
    return found


EXPECTED = {
    "sum": [3, 30],
    "mean": [1.5, 15.0],
    "max": [2, 20],
    "min": [1, 10],
    "scaled": [1.5, 15.0],
    "flags": [False, True],
    "gathered": [1, 10, 2, 20],
    "numbers": [0, 1],
    "empty": [0, 3],
    "complex": [1j, 1 + 1j],
    "objects": ["rank 0", "rank 1", "rank 1"],
    "single objects": [{"rank": 0}, {"rank": 1}],
    "padded first": [[9, 0], [1, 1]],
    "broadcast": [2, 20],
    "broadcast objects": [1, {"of": 1}],
    "triggers": [False, True, False],
}


def test_tables(ranks2: Ranks) -> None:
    results = ranks2.run(tables)
    for rank, found in enumerate(results):
        assert {key: found[key] for key in EXPECTED} == EXPECTED
        assert found["none"] == [rank + 1, 10 * (rank + 1)]
        assert found["padded"].tolist() == [0, 9, 1, 1]
        assert found["nested"]["a"][0].tolist() == [[0, 0], [1, 1]]
        assert found["nested"]["b"][0].tolist() == [False, True]
    assert [found["share"] for found in results] == [["a", "b"], ["c"]]


def places() -> list[Any]:
    accelerator = Accelerator(cpu=True)

    @accelerator.on_main_process
    def on_main() -> str:
        return "main"

    @accelerator.on_process(process_index=1)
    def on_one() -> str:
        return "one"

    last = accelerator.on_last_process(lambda: "last")
    local = accelerator.on_local_process(lambda: "local", local_process_index=0)
    return [
        accelerator.num_processes,
        accelerator.process_index,
        accelerator.local_process_index,
        accelerator.is_main_process,
        accelerator.is_local_main_process,
        accelerator.is_last_process,
        on_main(),
        on_one(),
        last(),
        local(),
        accelerator.on_local_main_process(lambda: "local main")(),
    ]


def test_who_is_who(ranks2: Ranks) -> None:
    assert ranks2.run(places) == [
        [2, 0, 0, True, True, False, "main", None, None, "local", "local main"],
        [2, 1, 1, False, False, True, None, "one", "last", None, None],
    ]


def goes_first(path: str) -> list[str]:
    accelerator = Accelerator(cpu=True)
    with accelerator.main_process_first(), open(path, "a") as stream:
        stream.write(f"{accelerator.process_index} ")
    accelerator.wait_for_everyone()
    with open(path) as stream:
        return stream.read().split()


def test_the_main_process_goes_first(ranks2: Ranks, tmp_path: Any) -> None:
    assert ranks2.run(goes_first, str(tmp_path / "order")) == [["0", "1"]] * 2


# ------------------------------------------------------------------ bad input


def gather_shapes(accelerator: Accelerator) -> None:
    accelerator.gather({"loss": torch.zeros(3), "x": torch.zeros(2 + accelerator.process_index, 5)})


def gather_structures(accelerator: Accelerator) -> None:
    accelerator.gather([torch.zeros(1)] * (1 + accelerator.process_index))


def gather_text(accelerator: Accelerator) -> None:
    accelerator.gather({"text": "a"})


def reduce_dtypes(accelerator: Accelerator) -> None:
    accelerator.reduce(torch.zeros(2, dtype=torch.float64 if accelerator.is_main_process else torch.float32))


def reduce_or_gather(accelerator: Accelerator) -> None:
    (accelerator.gather if accelerator.is_main_process else accelerator.reduce)(torch.zeros(2))


def reduce_otherwise(accelerator: Accelerator) -> None:
    accelerator.reduce(torch.zeros(2), "avg")


def pad_numbers(accelerator: Accelerator) -> None:
    accelerator.pad_across_processes(torch.zeros([2] * (1 + accelerator.process_index)), dim=0)


def barrier_or_objects(accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        accelerator.gather_object([1])
    else:
        accelerator.wait_for_everyone()


REFUSED: list[tuple[Callable[[Accelerator], None], str, str]] = [
    (gather_shapes, "ValueError", "got rank 0: float32 [2, 5]; rank 1: float32 [3, 5] at ['x']. Make them alike with"),
    (gather_structures, "ValueError", "got rank 0: nothing; rank 1: float32 [1] at [1]"),
    (gather_text, "TypeError", "got str at ['text']"),
    (reduce_dtypes, "ValueError", "got rank 0: float64 [2]; rank 1: float32 [2]"),
    (reduce_or_gather, "ValueError", "Expected all ranks to do the same, got rank 0: gather; rank 1: reduce (sum)"),
    (reduce_otherwise, "ValueError", "'none', got 'avg'"),
    (pad_numbers, "ValueError", "got the shapes rank 0: [2]; rank 1: [2, 2]"),
    (barrier_or_objects, "ValueError", "got rank 0: gather_object; rank 1: wait_for_everyone"),
]


def refusals() -> list[tuple[str, str]]:
    os.environ["ACCEL_DEBUG_MODE"] = "1"
    accelerator = Accelerator(cpu=True)
    found = []
    for refused, _, _ in REFUSED:
        try:
            refused(accelerator)
            found.append(("nothing", ""))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return found


def test_refused_on_every_rank(ranks2: Ranks) -> None:
    for found in ranks2.run(refusals):
        for (refused, kind, said), (kind_found, message) in zip(REFUSED, found, strict=True):
            assert (refused.__name__, kind_found) == (refused.__name__, kind), message
            assert said in message


@pytest.mark.parametrize("world", [1], indirect=True)
def test_one_process(world: Ranks) -> None:
    (found,) = world.run(tables)
    assert (found["sum"], found["mean"], found["numbers"]) == ([1, 10], [1, 10], [0])
    assert found["objects"] == ["rank 0"]
    assert found["share"] == ["a", "b", "c"]


def means_of_narrow_numbers() -> list[float]:
    accelerator = Accelerator(cpu=True)
    narrow = [torch.tensor([100], dtype=torch.int8), torch.tensor([60000.0], dtype=torch.float16)]
    found = accelerator.reduce(narrow, "mean")
    assert found[1].dtype is torch.float16
    return [float(tensor) for tensor in found]


def test_means_of_narrow_numbers_do_not_overflow(ranks2: Ranks) -> None:
    assert ranks2.run(means_of_narrow_numbers) == [[100, 60000]] * 2
