"""Dtype policies by themselves: what contradicts itself, what devices lack, what becomes of a module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_accel import AccelPrecision
from lightning_accel.core.placement import find_row
from lightning_accel.plugins import float8
from lightning_accel.plugins.float8 import require_float8

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compute": torch.int8}, "Expected compute to be one of torch.float16.* got torch.int8"),
        ({"compute": torch.float8_e4m3fn}, "Expected compute to be one of"),
        ({"buffers": "bf16"}, "Expected buffers to be one of .* got 'bf16'"),
        (
            {"compute": F32, "autocast": True},
            "Expected compute to be torch.float16 or torch.bfloat16 with autocast=True",
        ),
        ({"compute": BF16, "master": F64}, "Expected master=torch.float32 with autocast=True, got torch.float64"),
        ({"compute": BF16, "param": F16}, "Expected param to be compute .torch.bfloat16. or master .torch.float32."),
        ({"compute": BF16, "param": F64}, "Expected param to be narrower than master.* got param=torch.float64"),
        ({"compute": BF16, "reduce": F64}, "Expected reduce to be narrower than master.* got reduce=torch.float64"),
        ({"compute": BF16, "autocast": False, "param": F32}, "Expected param to be compute .* with autocast=False"),
        ({"compute": F32, "master": BF16}, "Expected compute to be narrower than master.* got compute=torch.float32"),
        ({"compute": BF16, "master": F16, "autocast": False}, "Expected compute to be narrower than master"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccelPrecision(**settings)


@pytest.mark.parametrize(
    ("settings", "name", "under_ddp", "under_zero2"),
    [
        ({}, "32-true", None, None),
        ({"compute": BF16}, "bf16-mixed", None, BF16),
        ({"compute": BF16, "param": F32}, "bf16-mixed", None, None),
        ({"compute": F16, "param": F16}, "16-mixed", F16, F16),
        ({"compute": BF16, "autocast": False}, "bf16-mixed", BF16, BF16),
        ({"compute": BF16, "autocast": False, "master": BF16}, "bf16-true", None, None),
        ({"compute": F32, "master": F64}, "32-mixed", F32, F32),
        ({"compute": F64}, "64-true", None, None),
    ],
)
def test_defaults_follow_from_what_is_computed_in(
    settings: dict[str, Any], name: str, under_ddp: torch.dtype | None, under_zero2: torch.dtype | None
) -> None:
    plugin = AccelPrecision(**settings)
    assert plugin.precision == name
    assert plugin.policy.rounded_to(find_row("ddp")) is under_ddp
    assert plugin.policy.rounded_to(find_row("zero2")) is under_zero2
    assert (plugin.scaler is not None) == (name == "16-mixed")


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.half = nn.Linear(2, 2).half()
        self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("settings", "params", "buffers"),
    [
        ({"compute": BF16}, F32, F32),
        ({"compute": BF16, "buffers": F64}, F32, F64),
        ({"compute": BF16, "autocast": False}, F32, BF16),
        ({"compute": BF16, "autocast": False, "buffers": F32}, F32, F32),
        ({"compute": F64}, F64, F64),
    ],
)
def test_parameters_and_buffers_are_converted(
    settings: dict[str, Any], params: torch.dtype, buffers: torch.dtype
) -> None:
    plugin = AccelPrecision(**settings)
    with pytest.raises(ValueError, match="Expected a strategy of lightning_accel together with AccelPrecision"):
        plugin.convert_module(Parts())
    plugin.connect_device("cpu", ask=True)
    module = plugin.convert_module(Parts())
    assert {p.dtype for p in module.parameters()} == {params, torch.complex64}
    assert {b.dtype for b in module.buffers()} == {buffers, torch.int64}  # BatchNorm counts batches


def test_what_devices_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = AccelPrecision(compute=BF16, reduce=F32)
    with pytest.raises(ValueError, match=r"got torch.float64 on MPS. Use torch.float32"):
        AccelPrecision(compute=F64).connect_device("mps", ask=True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    plugin.connect_device("cuda", ask=False)  # before processes are forked
    with pytest.raises(ValueError, match="Expected a CUDA device that has bfloat16, got Tesla V100"):
        plugin.connect_device("cuda", ask=True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    plugin.connect_device("cuda", ask=True)
    assert plugin.device == "cuda"


def test_fp8_needs_torchao_and_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-accel\[fp8\]'"):
        AccelPrecision(compute=BF16, fp8=True)
    monkeypatch.setattr(float8, "find_spec", lambda _: "found")
    with pytest.raises(ValueError, match=r"Expected compute=torch.bfloat16 together with fp8, got torch.float16"):
        AccelPrecision(compute=F16, fp8=True)
    plugin = AccelPrecision(compute=BF16, fp8=True)
    assert plugin.precision == "fp8-mixed"
    with pytest.raises(ValueError, match=r"Expected a CUDA device of capability 8.9 or more .* got cpu"):
        plugin.connect_device("cpu", ask=True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    require_float8(True, "cuda", ask=False)
    with pytest.raises(ValueError, match=r"got A100 of capability 8.0. Use precision='bf16-mixed'"):
        require_float8(True, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    require_float8(True, "cuda")
