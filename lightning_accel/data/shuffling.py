"""Orders that are the same on every rank, whatever a rank's own random numbers, and others in each epoch.

Torch's samplers that draw from a generator draw from one that is seeded for the epoch. What any other sampler or
dataset draws from the process's random numbers comes from a stream that is seeded in the same way.
"""

from __future__ import annotations

import copy
import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from typing_extensions import override

from lightning_accel.core import rng

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def seed_of(seed: int, *purpose: object) -> int:
    """A number of 63 bits that depends on a seed and a purpose alone."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draws_from_generator(sampler: Any) -> bool:
    """Whether all that a sampler draws is from its own generator: torch's and torchdata's that shuffle."""
    if type(sampler) in _SHUFFLING:
        return True
    return type(sampler).__module__.startswith("torchdata.") and hasattr(sampler, "generator")


def is_steady(sampler: Any) -> bool:
    """Whether a sampler gives all ranks the same order by itself."""
    return type(sampler) in (SequentialSampler, SeededSampler)


class SeededSampler(Sampler[Any]):
    """A sampler of torch's whose order depends on a seed and the epoch alone.

    Args:
        sampler: One that draws from its ``generator``; it is not changed.
        seed: The seed.

    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self._sampler = sampler
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Have the next order be that of an epoch."""
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[Any]:
        sampler = copy.copy(self._sampler)
        sampler.generator = torch.Generator().manual_seed(seed_of(self.seed, "order", self.epoch))
        return iter(sampler)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":  # within pickle and copy
            raise AttributeError(name)
        return getattr(self._sampler, name)


class Alike:
    """Has ranks draw the same random numbers in going through a sampler or a dataset.

    Args:
        seed: The same on all ranks.

    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = 0
        self._passes = 0  # of a worker's copy, which is told of no epochs: persistent workers go through several

    def __call__(self) -> Callable[[Callable[[], Any]], Any]:
        """What calls functions in one pass, with random numbers beside those of the process."""
        worker = get_worker_info()
        epoch = self.epoch
        if worker is not None:
            epoch += self._passes
            self._passes += 1
        number = seed_of(self.seed, "draws", epoch, 0 if worker is None else worker.id)
        stream = rng.Stream()
        with stream.drawn_from():
            torch.default_generator.manual_seed(number)  # not torch.manual_seed: that seeds accelerators as well
            random.seed(number)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(number % 2**32)

        def take(function: Callable[[], Any]) -> Any:
            with stream.drawn_from():
                return function()

        return take
