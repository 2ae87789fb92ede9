"""Lightning's wrappers of an optimizer, which a strategy makes anew, end without ending the optimizer."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from models import Regression, loader, trainer

from harness import Ranks

ended: list[int] = []


class Ending(torch.optim.SGD):
    """Frees something at its end, as DeepSpeedCPUAdam does."""

    def __del__(self) -> None:
        ended.append(id(self))


class Module(Regression):
    def configure_optimizers(self) -> Any:
        return Ending(self.parameters(), lr=0.1)


def fit() -> list[int]:
    ended.clear()
    used = trainer("accel_zero2", max_epochs=1)
    used.fit(Module(), loader())
    (optimizer,) = used.strategy.optimizers
    used.strategy.optimizers = [optimizer]  # as a precision plugin does, and others
    gc.collect()
    before = list(ended)
    assert type(optimizer) is Ending
    return before


@pytest.mark.filterwarnings("ignore:Ending is not known")
def test_only_the_optimizer_itself_ends(ranks2: Ranks) -> None:
    assert ranks2.run(fit) == [[], []]
