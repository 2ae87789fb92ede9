"""Random states: put back bit by bit, after a trip through a file as well."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_accel.core import rng


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def draws() -> tuple[Any, ...]:
    """Some of each kind; one normal number has Python and numpy keep another one for the next time."""
    return (
        torch.rand(5).tolist(),
        torch.randn(3).tolist(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
    )


@pytest.mark.parametrize("half", [False, True], ids=["fresh", "with half of a pair of normal numbers"])
def test_the_next_draws_are_those_that_would_have_been(half: bool) -> None:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    draws()
    if half:
        random.gauss(0, 1), np.random.randn()
    state = through_a_file(rng.collect())
    expected = draws(), draws()
    rng.restore(state)
    assert (draws(), draws()) == expected


def test_numpy_that_is_not_in_use_stays_out_of_it() -> None:
    script = """
import sys
from lightning_accel.core import rng
import torch
for name in [name for name in sys.modules if name.split(".")[0] == "numpy"]:
    del sys.modules[name]
state = rng.collect()
assert state["numpy"] is None and "numpy" not in sys.modules
rng.restore(state)
rng.restore(rng.derive(state, 1))
assert "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_another_bit_generator_of_numpy_is_left_alone() -> None:
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(5))
        state = rng.collect()
        assert state["numpy"] is None
        expected = np.random.rand(3).tolist()
        np.random.set_bit_generator(np.random.PCG64(5))
        rng.restore(state)
        assert np.random.rand(3).tolist() == expected
    finally:
        np.random.set_bit_generator(before)


def test_derived_states_depend_on_the_state_and_the_rank_alone() -> None:
    torch.manual_seed(0)
    state = rng.collect()
    seen = []
    for base in (state, through_a_file(state)):
        for rank in (2, 3):
            rng.restore(rng.derive(base, rank))
            seen.append(draws())
    assert seen[:2] == seen[2:]
    torch.manual_seed(1)
    rng.restore(rng.derive(rng.collect(), 2))
    seen.append(draws())
    kinds = list(zip(seen[0], seen[1], seen[4], strict=True))
    assert all(len({str(value) for value in kind}) == 3 for kind in kinds)


def test_a_stream_draws_beside_the_process() -> None:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    state = rng.collect()
    expected = draws(), draws()
    rng.restore(state)
    torch.manual_seed(1)
    others = rng.collect()
    beside = draws()
    rng.restore(others)
    stream = rng.Stream(state)
    with stream.drawn_from():
        first = draws()
    second = []

    def fail() -> None:
        with stream.drawn_from():
            second.append(draws())
            raise ValueError

    pytest.raises(ValueError, fail)
    assert (first, *second) == expected
    assert draws() == beside


class Accelerator:
    """A device's module of torch, as `torch.cuda`."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def get_rng_state(self) -> torch.Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.generator.set_state(state)

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def draw(self) -> list[float]:
        return torch.rand(3, generator=self.generator).tolist()


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> tuple[Accelerator, torch.device]:
    made = Accelerator()
    monkeypatch.setattr(torch, "maia", made, raising=False)  # a device that torch has no module for
    return made, torch.device("maia")


def test_the_accelerators_generator_belongs_to_it(accelerator: tuple[Accelerator, torch.device]) -> None:
    module, device = accelerator
    state = through_a_file(rng.collect(device))
    expected = module.draw()
    rng.restore(state)  # on the CPU, where nothing is known of it
    assert module.draw() != expected
    rng.restore(state, device)
    assert module.draw() == expected


def test_an_accelerator_of_which_there_is_nothing_is_seeded(accelerator: tuple[Accelerator, torch.device]) -> None:
    module, device = accelerator
    torch.manual_seed(0)
    state = rng.collect()
    drawn = []
    for wanted in (state, rng.derive(state, 1), state):
        rng.restore(wanted, device)
        drawn.append(module.draw())
    assert drawn[0] == drawn[2] != drawn[1]


GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(3, generator=g).tolist()),
    "python": (lambda: random.Random(1), lambda g: g.gauss(0, 1)),
    "PCG64": (lambda: np.random.default_rng(1), lambda g: g.random(3).tolist()),
    "Philox": (lambda: np.random.Generator(np.random.Philox(1)), lambda g: g.random(3).tolist()),
    "MT19937": (lambda: np.random.Generator(np.random.MT19937(1)), lambda g: g.random(3).tolist()),
    "RandomState": (lambda: np.random.RandomState(1), lambda g: g.randn()),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_of_their_own_go_on(kind: str) -> None:
    make, draw = GENERATORS[kind]
    generator = make()
    assert rng.is_generator(generator)
    draw(generator)
    state = through_a_file(rng.generator_state(generator))
    expected = draw(generator), draw(generator)
    other = make()
    rng.set_generator_state(other, state)
    assert (draw(other), draw(other)) == expected


def test_what_is_no_generator() -> None:
    assert not any(rng.is_generator(value) for value in (None, 1, torch.zeros(2), random, np.random))


@pytest.mark.cuda
def test_cuda_draws_what_it_would_have_drawn() -> None:
    device = torch.device("cuda")
    state = through_a_file(rng.collect(device))
    expected = torch.rand(5, device=device).tolist()
    rng.restore(state, device)
    assert torch.rand(5, device=device).tolist() == expected
