"""precision="fp8-mixed", a name that Lightning's Trainer and Fabric do not know.

Their connectors (Lightning 2.6, in ``_check_config_and_set_final_flags``) look precisions up in a fixed list. For the
strategies of this package the name is exchanged for the plugin it stands for before they do. Should Lightning's
connectors change so that this is not possible any more, Lightning's own error about the name is raised.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.connector import _Connector
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies import Strategy as FabricStrategy
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from lightning_accel.plugins.accel_precision import AccelPrecision

_CHECK = "_check_config_and_set_final_flags"
_MARK = "_knows_float8"


def offer_float8(trainers: type[Strategy], fabrics: type[FabricStrategy]) -> None:
    """Have fp8-mixed be known for strategies of these classes, and leave all others to Lightning."""
    _offer(_AcceleratorConnector, trainers, StrategyRegistry)
    _offer(_Connector, fabrics, STRATEGY_REGISTRY)


def _offer(connector: type, strategies: type, registry: Mapping[str, Any]) -> None:
    check = getattr(connector, _CHECK, None)
    if check is None or getattr(check, _MARK, False):
        return
    signature = inspect.signature(check)

    def is_ours(strategy: Any) -> bool:
        if isinstance(strategy, str):
            strategy = strategy.lower()
            return strategy in registry and issubclass(registry[strategy]["strategy"], strategies)
        return isinstance(strategy, strategies)

    @functools.wraps(check)
    def check_float8(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("precision") == "fp8-mixed" and is_ours(given.get("strategy")) and "plugins" in given:
            plugins = given["plugins"]
            others = plugins if isinstance(plugins, Iterable) else [] if plugins is None else [plugins]
            plugin = AccelPrecision(compute=torch.bfloat16, fp8=True)
            given = {**given, "precision": None, "plugins": [*others, plugin]}
        return check(**given)

    setattr(check_float8, _MARK, True)
    setattr(connector, _CHECK, check_float8)
