"""precision="16-mixed" on the CPU is what it says.

Lightning's Trainer and Fabric turn it into bf16-mixed there, before a strategy is asked (Lightning 2.6, in
``_check_and_init_precision`` of their connectors). fp16 autocast works on CPUs since torch 2.3, so for the strategies
of this package that method is answered here. Should Lightning's connectors change so that this is not possible any
more, Lightning's own warning about bf16 is shown: nothing happens silently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.connector import _Connector
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.fabric.strategies import Strategy as FabricStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.accelerators import CPUAccelerator as TrainerCPUAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

_CHOOSE = "_check_and_init_precision"
_MARK = "_keeps_float16_on_cpu"


def keep_float16_on_cpu(trainers: tuple[type[Strategy], ...], fabrics: tuple[type[FabricStrategy], ...]) -> None:
    """Have 16-mixed stay fp16 on the CPU for strategies of these classes, and leave all others to Lightning."""
    _keep(_AcceleratorConnector, trainers, "_precision_flag", "_precision_plugin_flag", MixedPrecision)
    _keep(_Connector, fabrics, "_precision_input", "_precision_instance", FabricMixedPrecision)


def _keep(connector: type, strategies: tuple[type, ...], asked: str, given: str, plugin: Callable[..., Any]) -> None:
    choose = getattr(connector, _CHOOSE, None)
    if choose is None or getattr(choose, _MARK, False):
        return

    @functools.wraps(choose)
    def choose_float16(self: Any) -> Any:
        on_cpu = isinstance(self.accelerator, (CPUAccelerator, TrainerCPUAccelerator))
        wanted = getattr(self, asked, None) == "16-mixed" and getattr(self, given, None) is None
        if not (wanted and on_cpu and isinstance(self.strategy, strategies)):
            return choose(self)
        rank_zero_info("Using 16bit Automatic Mixed Precision (AMP) on the CPU")
        return plugin(precision="16-mixed", device="cpu")

    setattr(choose_float16, _MARK, True)
    setattr(connector, _CHOOSE, choose_float16)
