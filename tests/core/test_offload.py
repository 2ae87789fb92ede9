"""Optimizer state and parameters that are kept away from the device."""

from __future__ import annotations

import errno
import os
import re
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from core.toys import ROW_NAMES, Net, adamw, build, compare, relative_error, sgd, train, train_alone, values
from lightning_accel.core import ROWS, Engine
from lightning_accel.core.offload import Offload, is_in_file
from rows import everyday

EXACT = 1e-12
"""Relative error in float64 that only rounding can make."""


def adafactor(parameters):
    return torch.optim.Adafactor(parameters, lr=0.01)


def by_hand(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, foreach=True, amsgrad=True)


class ByCount(torch.optim.Optimizer):
    """Its step size depends on how often ``step`` was called."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("sum", torch.zeros_like(parameter)).add_(parameter.grad)
                    parameter.add_(self.state[parameter]["sum"], alpha=-group["lr"] / self.calls)


OPTIMIZERS = [adamw, sgd, adafactor, by_hand, ByCount]


def wide():
    return Net(65, 3)  # parts of more than 4 KiB: smaller ones stay in memory


def compared(row, make_optimizer, offload, folder, *, copying):
    """Error against the single process, the optimizer's state in files and in memory, and how often hooks ran."""
    alone = build(wide)
    train_alone(alone, make_optimizer(alone.parameters()), 20, dist.get_world_size(), accumulate=2)
    module = build(wide)
    with ExitStack() as stack:
        if copying:  # as on a device: what the CPU updates is a copy of what rests elsewhere
            stack.enter_context(mock.patch("lightning_accel.core.segment.is_on_host", return_value=False))
        engine = Engine(module, row, offload=offload, offload_dir=folder)
        optimizer = make_optimizer(module.parameters())
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        engine.add_optimizer(optimizer)
        train(engine, optimizer, 20, accumulate=2)
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        again = optimizer.state_dict()
    assert flat(state) == flat(again)
    tensors = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    report = engine.report()
    error = relative_error(values(engine), alone.parameters())
    engine.close()
    assert {group.get("fused") for group in optimizer.param_groups} <= {None, False}, "settings are given back"
    return error, sum(map(is_in_file, tensors)), len(tensors), report.at_rest, calls


def flat(state):
    return {
        (index, key): value.tolist() if isinstance(value, torch.Tensor) else value
        for index, values in state.get("state", {}).items()
        for key, value in values.items()
    }


@pytest.mark.parametrize("copying", [False, True], ids=["in place", "copying"])
@pytest.mark.parametrize(
    ("row", "offload", "make_optimizer"),
    [
        *[("ddp", "optimizer", make) for make in (adamw, sgd, by_hand)],  # others see the module's own parameters there
        *[("zero2", "optimizer", make) for make in OPTIMIZERS],
        *[("fsdp", "parameters", make) for make in OPTIMIZERS],
        ("fsdp_partial", None, adamw),
    ],
)
def test_training_equals_the_single_process(ranks2, tmp_path, row, offload, make_optimizer, copying):
    folder = tmp_path / "state"
    for error, in_files, tensors, at_rest, calls in ranks2.run(
        compared, row, make_optimizer, offload, folder, copying=copying
    ):
        assert error < EXACT
        if make_optimizer is not adafactor:  # its state is a row and a column for each matrix: small
            assert in_files > 0
            assert at_rest["optimizer_state_in_files"] > 4 * at_rest["optimizer_state"]
        assert tensors > 0
        assert calls == ["before", "after"] * 20
    assert list(folder.iterdir()) == [], "a file must not outlive the process that maps it"


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 3)
        self.gain = nn.ParameterList([nn.Parameter(torch.randn(3, dtype=torch.complex128))])

    def forward(self, x):
        return (self.linear(x) * self.gain[0]).real


def complex_parameters():
    return compare(Complex, "zero2", offload="optimizer")


def test_complex_parameters(ranks2):  # torch's fused kernels do not take them
    assert max(ranks2.run(complex_parameters)) < EXACT


def in_host_memory(row, offload):
    module = build(wide)
    engine = Engine(module, row, offload=offload)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 2)
    found = engine.report().at_rest
    engine.close()
    return found


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_without_a_folder_state_is_in_memory(ranks2, row):
    offload = "parameters" if row.startswith("fsdp") else "optimizer"
    for at_rest in ranks2.run(in_host_memory, row, offload):
        assert "optimizer_state_in_files" not in at_rest
        assert at_rest["optimizer_state"] > 0.9 * at_rest["parameters"]


def test_a_value_in_a_file(tmp_path):
    offload = Offload(optimizer=True, folder=tmp_path)
    value = torch.randn(100, 70, dtype=torch.float64).T
    kept = offload.keep(value)
    assert is_in_file(kept)
    assert not is_in_file(value)
    assert torch.equal(kept, value)
    assert kept.stride() == value.stride()
    assert offload.keep(kept) is kept
    kept.add_(1)
    assert torch.equal(kept, value + 1)
    small = torch.ones(10)
    assert offload.keep(small) is small
    assert list(tmp_path.iterdir()) == []
    mappings = Path("/proc/self/maps")
    if mappings.exists():
        assert re.search(rf"{re.escape(str(tmp_path))}/lightning-accel-\S+ \(deleted\)", mappings.read_text())


def test_a_full_disk_is_an_error(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("os.posix_fallocate", side_effect=full), pytest.raises(OSError, match="No space left"):
        Offload(optimizer=True, folder=tmp_path).keep(torch.ones(10_000))
    assert list(tmp_path.iterdir()) == []


def test_what_settings_mean(tmp_path):
    zero2, fsdp = ROWS["zero2"], ROWS["fsdp"]
    assert Offload.of(None, None, zero2) == Offload()
    assert Offload.of("optimizer", None, zero2) == Offload(optimizer=True)
    assert Offload.of("parameters", None, fsdp) == Offload(optimizer=True, parameters=True)
    assert Offload.of(None, tmp_path / "new", zero2) == Offload(optimizer=True, folder=tmp_path / "new")
    assert (tmp_path / "new").is_dir()


def test_settings_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Expected offload to be 'optimizer', 'parameters' or None, got 'moon'"):
        Offload.of("moon", None, ROWS["fsdp"])
    with pytest.raises(ValueError, match=r"for offload='parameters', got 'zero2'.*Use accel_fsdp"):
        Offload.of("parameters", None, ROWS["zero2"])
    with pytest.raises(ValueError, match=r"Expected offload_dir to be a folder that can be written to: .*exists"):
        Offload.of("optimizer", tmp_path / "file", ROWS["fsdp"])


def whole_optimizer_under_ddp():
    module = build(Net)
    Engine(module, "ddp", offload="optimizer").add_optimizer(adafactor(module.parameters()))


def test_optimizers_on_whole_parameters_are_refused_where_nothing_is_sharded(ranks2):
    for error in ranks2.run_expecting_error(whole_optimizer_under_ddp):
        assert error is not None
        assert error[0] == "ValueError"
        assert "an elementwise optimizer for offload with row 'ddp', got Adafactor" in error[1]
