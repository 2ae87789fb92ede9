"""Fixtures and defaults for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

from harness import Ranks

# Hypothesis measures single examples, and a busy machine of two cores is no reason to fail.
settings.register_profile("lightning_accel", deadline=None, print_blob=True)
settings.load_profile("lightning_accel")

# Whenever a rank joins a store, torch asks for the name of its address, which only a name server could know. One answer
# that is lost holds a test up for as long as the resolver waits for it, by default five seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1")

# As in the ranks: a sum taken by one thread is the same sum on every machine.
torch.set_num_threads(1)


HAS_XLA = find_spec("torch_xla") is not None
if HAS_XLA:
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("CPU_NUM_DEVICES", "4")
    # Tests compile for longer than they run; results are the same.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ.setdefault("XLA_FLAGS", flags)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch.cuda.is_available() says there is none")
    if item.get_closest_marker("xla"):
        if not HAS_XLA:
            pytest.skip("needs torch_xla, which has an environment of its own: make test-xla")
        from lightning_accel.core.xla import start

        start()  # nothing may go backward on the CPU before


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A Trainer in this process tells its ranks and port to the environment, and what a later test starts reads it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    """Ranks by their number.

    Each set is shared by the whole session: a rank takes seconds to import Lightning.
    """
    with ExitStack() as stack:
        sets: dict[int, Ranks] = {}

        def of(world_size: int) -> Ranks:
            if world_size not in sets:
                sets[world_size] = stack.enter_context(Ranks(world_size))
            return sets[world_size]

        yield of


@pytest.fixture(scope="module")
def ranks2(ranks_of: Callable[[int], Ranks]) -> Ranks:
    """Two ranks."""
    return ranks_of(2)


@pytest.fixture(scope="module")
def ranks3(ranks_of: Callable[[int], Ranks]) -> Ranks:
    """Three ranks: the smallest world that is no power of two, where padding and uneven shards show."""
    return ranks_of(3)


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, ranks_of: Callable[[int], Ranks]) -> Ranks:
    """Ranks of the size a test asks for: `@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)`."""
    return ranks_of(request.param)
