"""What an Accelerator writes besides checkpoints, and what it gives back of models."""

from __future__ import annotations

import csv
import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.loggers import CSVLogger
from loops import ROWS
from models import Net, assert_close, values
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness import Ranks
from lightning_accel import Accelerator, engine_of
from lightning_accel.strategies.fabric import AccelZeROStrategy
from rows import everyday


def saved_models(row: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    accelerator = Accelerator(strategy=row, cpu=True)
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(2, 5, dtype=torch.float64)).mean())
    optimizer.step()
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "config.json").write_text("kept")
    accelerator.save_model(model, folder, max_shard_size=500)
    accelerator.save_model(model, f"{folder}/binary")  # which is not what was saved last
    accelerator.save_model(model, f"{folder}/binary", safe_serialization=False)
    state = accelerator.get_state_dict(model)
    unwrapped = accelerator.get_state_dict(accelerator.unwrap_model(model))
    assert state.keys() == unwrapped.keys()
    assert all(torch.equal(unwrapped[name], value) for name, value in state.items())
    return values(net), state, accelerator.unwrap_model(model) is net


@pytest.mark.parametrize("row", everyday(ROWS))
def test_models_are_saved_from_any_row(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    (expected, state, same), (_, other_state, _) = ranks2.run(saved_models, row, str(tmp_path / "model"))
    folder = tmp_path / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {
        name: tensor for file in set(index["weight_map"].values()) for name, tensor in load_file(folder / file).items()
    }
    assert len(set(index["weight_map"].values())) > 1
    assert_close(found, expected, 0.0)
    assert_close(torch.load(folder / "binary" / "pytorch_model.bin"), expected, 0.0)
    assert [file.name for file in (folder / "binary").iterdir()] == ["pytorch_model.bin"]
    assert_close(state, expected, 0.0)
    assert not other_state or row in ("ddp", "zero1", "zero2")
    assert (folder / "config.json").read_text() == "kept"
    assert same


def warned_of(row: str, folder: str) -> list[str]:
    accelerator = Accelerator(strategy=row, mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(nn.Linear(8, 8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = accelerator.get_state_dict(model)
        accelerator.save_model(model, f"{folder}/model")
        accelerator.save_state(f"{folder}/state")
    assert all(value.dtype == torch.float32 for value in state.values())
    return [str(warning.message) for warning in caught if "rounded" in str(warning.message)]


@pytest.mark.parametrize("row", everyday(["zero1", "zero2", "fsdp"]))
def test_precise_values_are_saved_without_a_word(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    assert ranks2.run(warned_of, row, str(tmp_path)) == [[], []]


def asked_alone(row: str, precision: str) -> str:
    accelerator = Accelerator(strategy=row, mixed_precision=precision, cpu=True, patience_s=1.0)
    net = nn.Linear(8, 8)
    model, _ = accelerator.prepare(net, torch.optim.SGD(net.parameters()))
    try:
        if accelerator.is_main_process:
            accelerator.get_state_dict(model)
        else:
            time.sleep(3)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("row", "precision"), [("zero2", "bf16"), ("fsdp", "no")])
def test_a_state_that_one_rank_alone_asks_for(ranks2: Ranks, row: str, precision: str) -> None:
    message, _ = ranks2.run(asked_alone, row, precision)
    assert "Expected every process to call get_state_dict" in message
    assert "process 1 did not" in message


def saved_twice(folder: str) -> list[str]:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Net())
    accelerator.save_model(model, folder, max_shard_size=500)
    accelerator.save_model(model, folder)
    accelerator.save({"a": torch.ones(2)}, f"{folder}/tensors.safetensors", safe_serialization=True)
    accelerator.save({"epoch": 3}, f"{folder}/more.pt")
    with pytest.raises(ValueError, match="Expected a dictionary of tensors"):
        accelerator.save({"epoch": 3}, f"{folder}/wrong", safe_serialization=True)
    return sorted(entry.name for entry in Path(folder).iterdir())


@pytest.mark.parametrize("world", [1], indirect=True)
def test_files_of_an_earlier_save_go(world: Ranks, tmp_path: Path) -> None:
    assert world.run(saved_twice, str(tmp_path / "model"))[0] == ["model.safetensors", "more.pt", "tensors.safetensors"]
    assert load_file(tmp_path / "model" / "tensors.safetensors")["a"].tolist() == [1, 1]


def metrics(row: str, split: bool, length: int) -> list[Any]:
    """What each epoch's gathered samples are, of a loader of batches of 3."""
    accelerator = Accelerator(strategy=row, split_batches=split, cpu=True)
    loader = accelerator.prepare(DataLoader(range(length), batch_size=4 if split else 3))
    found = [accelerator.gather_for_metrics(batch).tolist() for batch in loader]
    outside = accelerator.gather_for_metrics(torch.zeros(1)).tolist()
    objects = [entry for batch in loader for entry in accelerator.gather_for_metrics([str(x) for x in batch.tolist()])]
    skipped = accelerator.skip_first_batches(loader, 1)
    rest = [x for batch in skipped for x in accelerator.gather_for_metrics({"x": batch})["x"].tolist()]
    return [sorted(x for batch in found for x in batch), outside, sorted(map(int, objects)), sorted(rest)]


@pytest.mark.parametrize("length", [7, 12, 13])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_metrics_have_every_sample_once(ranks2: Ranks, split: bool, length: int) -> None:
    first = 4 if split else 6
    for samples, outside, objects, rest in ranks2.run(metrics, "ddp", split, length):
        assert samples == objects == list(range(length))
        assert outside == [0, 0]
        assert rest == list(range(first, length))


def joined_metrics() -> list[Any]:
    """Samples of 13, in batches of 2 that are not filled up, so that rank 0 has one more."""
    accelerator = Accelerator(cpu=True, even_batches=False)
    model, loader = accelerator.prepare(Net(), DataLoader(range(13), batch_size=2))
    with accelerator.join_uneven_inputs([model]):
        found = [accelerator.gather_for_metrics({"x": batch}) for batch in loader]
        names = [accelerator.gather_for_metrics([str(x) for x in batch.tolist()]) for batch in loader]
    return [[x for batch in found for x in batch["x"].tolist()], [int(x) for batch in names for x in batch]]


def test_metrics_of_uneven_inputs(ranks2: Ranks) -> None:
    assert ranks2.run(joined_metrics) == [[list(range(13))] * 2] * 2


def mixed_metrics() -> list[str]:
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(range(7), batch_size=3))
    messages = []
    for batch in loader:
        texts = [str(x) for x in batch.tolist()]
        for mixed in ({"x": batch, "text": texts}, (batch, texts)):
            try:
                accelerator.gather_for_metrics(mixed)
            except TypeError as error:
                messages.append(str(error))
    return messages


def test_metrics_of_objects_in_a_structure_are_refused(ranks2: Ranks) -> None:
    """The duplicates could not be left out of these."""
    for messages in ranks2.run(mixed_metrics):
        assert len(messages) == 4
        assert "Expected tensors, or a list of one object for each sample" in messages[0]
        assert "got a dict with other things than tensors" in messages[0]
        assert "got a tuple" in messages[1]


def logged(folder: str) -> str:
    own = CSVLogger(folder, name="own")
    accelerator = Accelerator(cpu=True, log_with=["csv", own], project_dir=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerator.init_trackers("project", config={"lr": 0.1})
    said = [str(warning.message) for warning in caught if "CSVLogger notes no hyperparameters" in str(warning.message)]
    assert len(said) == accelerator.is_main_process
    assert accelerator.get_tracker("CSVLogger") is own
    with pytest.raises(ValueError, match="got a tensor of shape \\[2\\] as 'loss'"):
        accelerator.log({"loss": torch.zeros(2)})
    accelerator.log({"loss": torch.tensor(2.0) * (1 + accelerator.process_index), "acc": 0.5}, step=3)
    name = type(accelerator.get_tracker("csv")).__name__
    with pytest.raises(ValueError, match="Did you mean 'csv'"):
        accelerator.get_tracker("cvs")
    accelerator.end_training()
    return name


def test_trackers(ranks2: Ranks, tmp_path: Path) -> None:
    """Process 0 writes."""
    assert ranks2.run(logged, str(tmp_path)) == ["CSVLogger"] * 2
    files = sorted(tmp_path.rglob("metrics.csv"))
    assert [file.relative_to(tmp_path).parts[0] for file in files] == ["own", "project"]
    for file in files:
        (row,) = csv.DictReader(file.open())
        assert (float(row["loss"]), float(row["acc"]), int(row["step"])) == (2.0, 0.5, 3)
    assert "lr: 0.1" in next(tmp_path.rglob("hparams.yaml")).read_text()


def others(folder: str) -> None:
    accelerator = Accelerator(strategy=AccelZeROStrategy(stage=1, bucket_cap_mb=1.0), cpu=True, seed=4)
    drawn = torch.rand(1)
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(4)))
    net = Net()
    model = accelerator.prepare(net)
    with accelerator.profile(output_trace_dir=folder), accelerator.autocast():
        model(torch.ones(1, 5, dtype=torch.float64))
    assert (Path(folder) / "profile_rank0.json").stat().st_size > 1000
    assert accelerator.free_memory(model, net) == (None, None)
    with pytest.raises(ValueError, match="none does"):
        engine_of(net)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(1, 5, dtype=torch.float64)).mean())
    optimizer.step()
    none, same = accelerator.prepare(None, nn.Linear(1, 1))
    assert none is None
    assert isinstance(accelerator.unwrap_model(same), nn.Linear)


@pytest.mark.parametrize("world", [1], indirect=True)
def test_profile_and_free_memory(world: Ranks, tmp_path: Path) -> None:
    world.run(others, str(tmp_path))
