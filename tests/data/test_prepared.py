"""What a prepared loader is to its user: a DataLoader with some more to say, and errors for what cannot be meant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_accel.data import ShardedLoader, prepare_data_loader


def whole(**kwargs: Any) -> DataLoader[Any]:
    loader: DataLoader[Any] = DataLoader(range(10), batch_size=4, **kwargs)  # type: ignore[arg-type]
    return loader


class Watching:
    def __init__(self) -> None:
        self.told: list[tuple[str, ShardedLoader]] = []

    def began(self, loader: ShardedLoader) -> None:
        self.told.append(("began", loader))

    def ended(self, loader: ShardedLoader) -> None:
        self.told.append(("ended", loader))


def test_it_is_a_loader() -> None:
    given = whole(num_workers=0, drop_last=False)
    loader = prepare_data_loader(given, rank=1, ranks=2)
    assert isinstance(loader, DataLoader)
    assert loader.dataset is given.dataset
    assert isinstance(loader.batch_sampler, BatchSampler)
    assert loader.sampler is given.sampler
    assert loader.batch_size == loader.batch_sampler.batch_size == 4
    assert loader.collate_fn is given.collate_fn
    assert loader.total_batch_size == 8
    split = prepare_data_loader(given, rank=1, ranks=2, split_batches=True)
    assert (split.batch_size, split.total_batch_size) == (2, 4)
    assert list(loader.batch_sampler) == [[4, 5, 6, 7], [2, 3, 4, 5]]
    assert not hasattr(loader, "nothing_of_the_kind")


def test_a_subclass_stays_one() -> None:
    class Mine(DataLoader[Any]):
        def __iter__(self) -> Any:
            return ({"x": batch} for batch in super().__iter__())

    loader = prepare_data_loader(Mine(range(4), batch_size=2), rank=0, ranks=2)  # type: ignore[arg-type]
    assert [batch["x"].tolist() for batch in loader] == [[0, 1]]


def test_persistent_workers_are_each_loaders_own() -> None:
    given = whole(num_workers=1, persistent_workers=True)
    next(iter(given))
    loader = prepare_data_loader(given, rank=1, ranks=2)
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [[4, 5, 6, 7], [2, 3, 4, 5]]
    assert [len(batch) for batch in given] == [4, 4, 2]


def test_who_watches_is_told_of_loops_that_are_left() -> None:
    watching = Watching()
    loader = prepare_data_loader(whole(), rank=0, ranks=2, watcher=watching)
    for _ in loader:
        assert watching.told == [("began", loader)]
    assert watching.told == [("began", loader), ("ended", loader)]
    for _ in loader:
        break
    assert watching.told[2:] == [("began", loader), ("ended", loader)]


def test_an_older_iteration_that_is_given_up_ends_nothing() -> None:
    watching = Watching()
    loader = prepare_data_loader(whole(), rank=0, ranks=1, watcher=watching)
    older = iter(loader)
    next(older)
    newer = iter(loader)
    next(newer)
    del older
    assert [what for what, _ in watching.told] == ["began", "began"]
    del newer
    assert [what for what, _ in watching.told] == ["began", "began", "ended"]


def test_batches_are_brought_to_the_device() -> None:
    def collate(samples: list[int]) -> dict[str, Any]:
        return {"x": torch.tensor(samples, dtype=torch.float), "name": [str(sample) for sample in samples]}

    loader = prepare_data_loader(whole(collate_fn=collate), rank=0, ranks=1, device="meta")
    assert [(batch["x"].device.type, batch["name"][0]) for batch in loader] == [
        ("meta", "0"),
        ("meta", "4"),
        ("meta", "8"),
    ]
    left = prepare_data_loader(whole(collate_fn=collate), rank=0, ranks=1, device="meta", put_on_device=False)
    assert next(iter(left))["x"].device.type == "cpu"


def test_even_batches_may_be_set_between_epochs() -> None:
    loader = prepare_data_loader(whole(), rank=1, ranks=2)
    assert loader.even_batches
    loader.even_batches = False
    assert [batch.tolist() for batch in loader] == [[4, 5, 6, 7]]
    loader.even_batches = True
    assert [batch.tolist() for batch in loader] == [[4, 5, 6, 7], [2, 3, 4, 5]]


def test_what_cannot_be_meant() -> None:
    with pytest.raises(TypeError, match=r"Expected a torch.utils.data.DataLoader, got list"):
        prepare_data_loader([1, 2], rank=0, ranks=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got one whose batches are divided already"):
        prepare_data_loader(prepare_data_loader(whole(), rank=0, ranks=2), rank=0, ranks=2)
    divided = whole(sampler=DistributedSampler(range(10), 2, 0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a DistributedSampler, which gives each of 2 ranks a part"):
        prepare_data_loader(divided, rank=0, ranks=2)
    with pytest.raises(ValueError, match="Expected a rank of 2 ranks, got 2"):
        prepare_data_loader(whole(), rank=2, ranks=2)
    with pytest.raises(ValueError, match="Expected a process group for dispatch_batches=True, got none"):
        prepare_data_loader(whole(), rank=0, ranks=2, dispatch_batches=True)
    with pytest.raises(ValueError, match=r"divide evenly for split_batches=True, got 4"):
        prepare_data_loader(whole(), rank=0, ranks=3, split_batches=True)
    with pytest.raises(TypeError, match="hold no prepared loader"):
        copy.deepcopy(prepare_data_loader(whole(), rank=0, ranks=2))
