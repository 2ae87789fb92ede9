"""Models that are filled where they are kept, and run from there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_accel.convert.safetensors_files import save_safetensors
from lightning_accel.inference import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)


class Net(nn.Module):
    """Attention (which uses a part's weights by itself), a norm with buffers, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.linspace(1, 2, 8), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) * self.scale
        hidden, _ = self.attention(hidden, hidden, hidden, need_weights=False)
        found: Tensor = self.head(self.norm(hidden))
        return found


@pytest.fixture
def trained() -> Net:
    torch.manual_seed(0)
    model = Net()
    model.norm(torch.randn(4, 5, 8))  # statistics of its own
    return model.eval()


@pytest.fixture
def checkpoint(trained: Net, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_safetensors(path, trained.state_dict(), {}, lambda _: None, max_shard_size=400)
    assert (path / "model.safetensors.index.json").exists()
    return path


TOKENS = torch.arange(10).view(2, 5)


@pytest.fixture(autouse=True)
def _not_trained():  # type: ignore[no-untyped-def]
    # With gradients, attention would take another kernel where weights are trained than where they are not.
    with torch.no_grad():
        yield


def empty() -> Net:
    with init_empty_weights():
        return Net().eval()


def test_parameters_are_empty_and_buffers_are_not() -> None:
    model = empty()
    assert all(p.is_meta for p in model.parameters())
    assert model.scale.tolist()[0] == 1.0
    assert model.head.weight is model.embedding.weight
    with init_empty_weights(include_buffers=True):
        assert Net().scale.is_meta
    assert not nn.Linear(1, 1).weight.is_meta


@pytest.mark.parametrize("made", [empty, Net], ids=["empty", "with values"])
@pytest.mark.parametrize(
    "device_map",
    [None, "auto", {"": "disk"}, {"": "cpu", "attention": "disk"}, {"": "disk", "embedding": "cpu", "head": "cpu"}],
    ids=["memory", "auto", "disk", "part of it", "all but the tied"],
)
def test_what_is_loaded_computes_the_same(made, device_map, trained: Net, checkpoint: Path) -> None:  # type: ignore[no-untyped-def]
    model = made().eval()
    assert load_checkpoint_and_dispatch(model, checkpoint, device_map) is model
    for _ in range(2):
        assert torch.equal(model(TOKENS), trained(TOKENS))
    on_disk = device_map not in (None, "auto")
    assert any(p.is_meta for p in model.parameters()) is on_disk  # given back after each forward


def test_weights_are_there_during_a_forward_only_and_one_module_at_a_time(trained: Net, checkpoint: Path) -> None:
    model = load_checkpoint_and_dispatch(empty(), checkpoint, {"": "disk"})
    seen: list[list[str]] = []

    def look(*_: object) -> None:
        seen.append([name for name, p in model.named_parameters() if not p.is_meta])

    for module in (model.embedding, model.attention, model.norm):
        module.register_forward_pre_hook(look)
    model(TOKENS)
    assert seen[0] == ["embedding.weight"]
    assert seen[1] == [f"attention.{name}" for name, _ in trained.attention.named_parameters()]
    assert seen[2] == ["norm.weight", "norm.bias"]


def test_weights_are_given_back_after_an_error(checkpoint: Path) -> None:
    model = load_checkpoint_and_dispatch(empty(), checkpoint, {"": "disk"})
    with pytest.raises(IndexError):
        model(torch.tensor([[99] * 5]))
    assert all(p.is_meta for p in model.parameters())
    model(TOKENS)


def test_weights_are_converted(trained: Net, checkpoint: Path) -> None:
    expected = trained.to(torch.bfloat16)(TOKENS)
    for device_map in (None, {"": "disk"}):
        model = load_checkpoint_and_dispatch(empty(), checkpoint, device_map, dtype=torch.bfloat16)
        model.scale = model.scale.to(torch.bfloat16)
        assert torch.equal(model(TOKENS), expected)


def test_other_checkpoints_load_as_well(trained: Net, tmp_path: Path) -> None:
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "last.ckpt")
    model = load_checkpoint_and_dispatch(empty(), tmp_path / "last.ckpt", {"": "disk"})
    assert torch.equal(model(TOKENS), trained(TOKENS))


def test_a_model_in_memory_goes_to_disk(trained: Net, tmp_path: Path) -> None:
    expected = trained(TOKENS)
    model = disk_offload(trained, tmp_path / "weights")
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model(TOKENS), expected)
    assert (tmp_path / "weights" / "model.safetensors").exists()


def test_a_model_in_memory_may_be_divided(trained: Net, tmp_path: Path) -> None:
    expected = trained(TOKENS)
    model = dispatch_model(trained, {"": "cpu", "attention": "disk"}, tmp_path)
    assert torch.equal(model(TOKENS), expected)
    assert [p.is_meta for p in (model.head.weight, model.attention.in_proj_weight)] == [False, True]
    with pytest.raises(ValueError, match="offload_dir, for what is on disk: cpu .*, disk .*; got none"):
        dispatch_model(Net(), {"": "cpu", "attention": "disk"})
    assert torch.equal(cpu_offload(Net().eval(), "cpu")(TOKENS).isfinite(), torch.ones(2, 5, 11, dtype=torch.bool))


class Shifted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, bias=False, batch_first=True)
        self.more = nn.Linear(2, 2)


def test_what_does_not_fit_is_refused_and_changes_nothing(trained: Net, checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Shifted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lacks 'more.bias', 'more.weight', and has 'attention.in_proj_bias'"):
        load_checkpoint_and_dispatch(model, checkpoint)
    save_file({"embedding.weight": torch.zeros(3, 3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"embedding.weight has shape \(11, 8\), there \(3, 3\)"):
        load_checkpoint_and_dispatch(model, tmp_path / "wrong.safetensors", strict=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_checkpoint_and_dispatch(model, checkpoint, strict=False)
    assert torch.equal(model.head.weight, trained.head.weight)
    with pytest.raises(FileNotFoundError, match="Expected a checkpoint at"):
        load_checkpoint_and_dispatch(model, tmp_path / "nowhere")


def test_what_has_no_values_anywhere_is_named(checkpoint: Path) -> None:
    with init_empty_weights(include_buffers=True):
        model = Net()
    with pytest.raises(ValueError, match="'scale' are on the meta device and not in"):
        load_checkpoint_and_dispatch(model, checkpoint)
    with pytest.raises(ValueError, match=r"have no values\. To load them use load_checkpoint_and_dispatch"):
        dispatch_model(empty(), {"": "cpu"})


def test_no_tensor_is_in_memory_twice(tmp_path: Path) -> None:
    """Memory that is no file's grows by one layer while the model is on disk, and by all layers when it is loaded."""
    layers, size = 8, 8 * 2**20
    width = int((size / 4) ** 0.5)
    save_file({f"{i}.weight": torch.zeros(width, width) for i in range(layers)}, tmp_path / "model.safetensors")
    script = f"""
        import threading
        import time
        import torch
        from torch import nn
        from lightning_accel.inference import init_empty_weights, load_checkpoint_and_dispatch

        def anonymous():
            return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

        def watch():
            global peak
            while True:
                peak = max(peak, anonymous())
                time.sleep(1e-4)

        with init_empty_weights():
            models = [nn.Sequential(*[nn.Linear({width}, {width}, bias=False) for _ in range({layers})]) for _ in "12"]
        batch = torch.zeros(1, {width})
        nn.Linear({width}, 1)(batch)
        peak = 0
        threading.Thread(target=watch, daemon=True).start()
        for model, place in zip(models, ("disk", "cpu")):
            peak = before = anonymous()
            load_checkpoint_and_dispatch(model, {str(tmp_path)!r}, {{"": place}})
            with torch.no_grad():
                model(batch)
            print((peak - before) / {size})
    """
    # What is freed goes back at once, so that it does not count.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
    on_disk, loaded = map(float, found)
    # A quarter of a layer for what torch and Python take besides.
    assert 0.75 < on_disk < 1.25
    assert layers - 0.25 < loaded < layers + 0.25


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight


def test_what_a_forward_notes_in_buffers_stays(tmp_path: Path) -> None:
    save_file({"weight": torch.full((2,), 3.0), "calls": torch.tensor(5)}, tmp_path / "model.safetensors")
    with init_empty_weights():
        model = Counting()
    load_checkpoint_and_dispatch(model, tmp_path, {"": "disk"})
    for _ in range(2):
        assert model(torch.ones(2)).tolist() == [3.0, 3.0]
    assert int(model.calls) == 7


def test_a_hook_of_the_user_that_raises_spoils_nothing(checkpoint: Path, trained: Net) -> None:
    model = empty()

    def refuse(*_: object) -> None:
        raise LookupError

    handle = model.head.register_forward_pre_hook(refuse)
    load_checkpoint_and_dispatch(model, checkpoint, {"": "disk"})
    with pytest.raises(LookupError):
        model(TOKENS)
    handle.remove()
    assert torch.equal(model(TOKENS), trained(TOKENS))
