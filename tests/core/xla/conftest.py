"""Tests of what runs on XLA devices start XLA first: nothing may go backward on the CPU before."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

HAS_XLA = find_spec("torch_xla") is not None

if HAS_XLA:
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("CPU_NUM_DEVICES", "4")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("xla"):
        if not HAS_XLA:
            pytest.skip("needs torch_xla, which has an environment of its own: make test-xla")
        from lightning_accel.core.xla import start

        start()
