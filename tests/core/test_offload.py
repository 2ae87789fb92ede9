"""Optimizer state and parameters that are kept away from the device."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import subprocess
import sys
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


# ------------------------------------------------------ DeepSpeed's CPU Adam

FP32 = 2e-5
"""Relative error of fp32 parameters that the rounding of 20 steps makes."""


MOMENTS = ("exp_avg", "exp_avg_sq")


class StandIn(torch.optim.Optimizer):
    """What the engine has to know of DeepSpeed's: its name, its integer step, its fp32 moments, its groups."""

    __module__, __qualname__ = "deepspeed.ops.adam.cpu_adam", "DeepSpeedCPUAdam"

    def __init__(self, parameters):
        defaults = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": True}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["bias_correction"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                assert parameter.dim() == 1, "not cut into flat segments"
                state = self.state[parameter]
                if not state:
                    moments = {key: torch.zeros_like(parameter, dtype=torch.float32) for key in MOMENTS}
                    state.update({"step": 0, **moments})
                state["step"] += 1
                assert type(state["step"]) is int
                first, second = (state[key] for key in MOMENTS)
                assert first.dtype == second.dtype == torch.float32
                gradient = parameter.grad.float()
                first.lerp_(gradient, 1 - group["betas"][0])
                second.lerp_(gradient**2, 1 - group["betas"][1])
                bias1, bias2 = (1 - beta ** state["step"] for beta in group["betas"])
                update = first / bias1 / ((second / bias2).sqrt() + group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


def stand_in(parameters):  # the class cannot be pickled under its borrowed name
    return StandIn(parameters)


def deepspeeds(parameters):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, lr=0.01, weight_decay=0.1)


@pytest.fixture(scope="module")
def built_deepspeed():
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    program = (
        "import torch; from deepspeed.ops.adam import DeepSpeedCPUAdam as A; A([torch.nn.Parameter(torch.ones(1))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"DeepSpeed's CPU Adam cannot be built here: {done.stderr.splitlines()[-1]}")


class Shortened(Net):
    """Leaves its last block out while it is short: the counts of steps differ."""

    def __init__(self) -> None:
        super().__init__(65, 3)
        self.short = False

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for block in self.blocks[: -1 if self.short else None]:
            x = block(x)
        return self.last(x)


def in_two_halves(row, makes, offload=None, folder=None):
    """Error against torch's AdamW of ten short and ten whole steps, and the final state beside torch's.

    Each half has an optimizer of its own, which gets the state of the other by state dict.
    """
    alone, module = build(Shortened, torch.float32), build(Shortened, torch.float32)
    reference = adamw(alone.parameters())
    saved = None
    for make, short in zip(makes, (True, False), strict=True):
        alone.short = module.short = short
        train_alone(alone, reference, 10, dist.get_world_size())
        engine = Engine(module, row, offload=offload, offload_dir=folder)
        optimizer = make(module.parameters())
        engine.add_optimizer(optimizer)
        if saved is not None:
            optimizer.load_state_dict(saved)
        train(engine, optimizer, 10)
        saved = optimizer.state_dict()
        whole = {segment.whole for segment in engine.optimizers[0].segments}
        error = relative_error(values(engine), alone.parameters())
        engine.close()
    return error, whole, saved["state"] if saved else {}, reference.state_dict()["state"]


def assert_in_two_halves(ranks, row, makes, offload, folder):
    for rank, (error, whole, ours, theirs) in enumerate(ranks.run(in_two_halves, row, makes, offload, folder)):
        assert error < FP32
        assert whole == {False}
        if rank > 0 and row != "ddp":
            continue
        assert {int(values["step"]) for values in ours.values()} == {10, 20}
        assert ours.keys() == theirs.keys()
        for index, expected in theirs.items():
            assert type(ours[index]["step"]) is (torch.Tensor if makes[1] is adamw else int)
            assert ours[index]["step"] == expected["step"]
            for key in MOMENTS:
                error = relative_error([ours[index][key]], [expected[key]])
                assert ours[index][key].shape == expected[key].shape
                assert error < 1e-3, (index, key)  # gradients at parameters that rounding has moved apart


PAIRS = pytest.mark.parametrize("to", ["its own", "torch's", "from torch's"])


def pair(to, make):
    return {"its own": (make, make), "torch's": (make, adamw), "from torch's": (adamw, make)}[to]


@PAIRS
@pytest.mark.parametrize("offload", [None, "optimizer"])
@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_an_optimizer_of_the_name_of_deepspeeds_equals_adamw(ranks2, row, offload, to):
    assert_in_two_halves(ranks2, row, pair(to, stand_in), offload, None)


@pytest.mark.timeout(900)  # the first time it is built, which takes minutes
@PAIRS
@pytest.mark.parametrize("offload", [None, "optimizer"])
@pytest.mark.parametrize("row", ["ddp", "zero2", "fsdp"])
def test_deepspeeds_cpu_adam_equals_adamw(built_deepspeed, ranks2, tmp_path, row, offload, to):
    assert_in_two_halves(ranks2, row, pair(to, deepspeeds), offload, tmp_path if offload else None)


def in_bf16(folder):
    module = build(wide, torch.bfloat16)
    engine = Engine(module, "zero2", offload="optimizer", offload_dir=folder)
    optimizer = stand_in(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    train(engine, optimizer, 2)  # it looks at the dtype itself
    return optimizer.state_dict()


def test_moments_of_deepspeeds_name_stay_fp32_beside_bf16_parameters(ranks2, tmp_path):
    state = ranks2.run(in_bf16, tmp_path)[0]["state"]
    assert {values[key].dtype for values in state.values() for key in MOMENTS} == {torch.float32}


def on_a_device():
    module = build(wide)
    engine = Engine(module, "zero2")
    with mock.patch.object(engine.collectives, "device", torch.device("cuda")):
        engine.add_optimizer(stand_in(module.parameters()))


def test_deepspeeds_name_without_offload_is_refused_on_a_device(ranks2):
    for kind, text in ranks2.run_expecting_error(on_a_device):
        assert kind == "ValueError"
        assert "Expected offload='optimizer' for DeepSpeedCPUAdam, which updates on the CPU only, got" in text
