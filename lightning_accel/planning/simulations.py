"""Several simulations at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

from lightning_accel.planning.simulation import Outcome, Setting, simulate
from lightning_accel.planning.subject import Subject

_subject: list[Subject] = []  # of the pool that is being made: a model may not be one that can be pickled


@contextmanager
def simulations(subject: Subject, settings: Sequence[Setting], processes: int) -> Iterator[Iterator[Outcome]]:
    """Simulate settings, and hand out what was found in their order.

    Args:
        subject: What is trained.
        settings: How.
        processes: How many settings are simulated at once, by forks of this process; 1: by itself, one by one.

    Raises:
        ValueError: If ``processes`` is not positive, and as ``simulate``.

    """
    if processes < 1:
        raise ValueError(f"Expected at least one process, got {processes}.")
    workers = min(processes, len(settings))
    if workers == 1:
        yield (simulate(subject, setting) for setting in settings)
        return
    _subject.append(subject)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_begin)
    try:
        yield pool.map(_simulate, settings)
    finally:
        pool.shutdown(cancel_futures=True)
        _subject.clear()


def _begin() -> None:
    torch.set_num_threads(1)  # threads do not come along with a fork


def _simulate(setting: Setting) -> Outcome:
    return simulate(_subject[0], setting)
