from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from lightning_accel.core.xla import start
from lightning_accel.core.xla.runtime import require_torch_xla


def started(code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which ``start`` comes after what is given."""
    script = f"import torch\n{code}\nfrom lightning_accel.core.xla import start\nprint(start(), start())"
    # Where SPMD is on, torch_xla has it be on in processes that are started from there as well.
    env = {name: value for name, value in os.environ.items() if name != "XLA_USE_SPMD"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, env=env)


@pytest.mark.skipif(find_spec("torch_xla") is not None, reason="torch_xla is installed")
def test_without_torch_xla_the_error_names_the_extra_and_the_versions() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"torch 2\.9\.x and torch_xla 2\.9\.0.*lightning-accel\[xla\]"):
        start()


def test_a_torch_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_accel.core.xla.runtime.version", lambda name: "2.9.0")
    monkeypatch.setattr("torch.__version__", "2.13.0+cpu")
    with pytest.raises(ImportError, match=r"Expected torch 2\.9 beside torch_xla 2\.9\.0, got torch 2\.13\.0\+cpu"):
        require_torch_xla()


def test_a_patch_release_of_torch_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_accel.core.xla.runtime.version", lambda name: "2.9.0")
    monkeypatch.setattr("torch.__version__", "2.9.1+cu128")
    require_torch_xla()


@pytest.mark.xla
def test_it_starts_once() -> None:
    ended = started("")
    assert ended.stdout.split() == ["4", "4"], ended.stderr


@pytest.mark.xla
def test_spmd_that_the_user_switched_on_is_taken() -> None:
    ended = started("from torch_xla import runtime; runtime.use_spmd(); torch.ones(1, device='xla')")
    assert ended.stdout.split() == ["4", "4"], ended.stderr


@pytest.mark.xla
def test_a_runtime_without_spmd_is_refused() -> None:
    ended = started("import torch_xla; (torch.ones(1, device='xla') + 1).item()")
    assert ended.returncode == 1
    assert "RuntimeError: Expected XLA to be started by lightning_accel, but its runtime runs already" in ended.stderr


@pytest.mark.xla
def test_a_backward_on_the_cpu_before_is_refused() -> None:
    ended = started("torch.ones(1, requires_grad=True).sum().backward()")
    assert ended.returncode == 1
    assert "RuntimeError: Expected XLA to be started before the first backward on the CPU" in ended.stderr
