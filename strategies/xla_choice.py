"""The strategy and the accelerator that are called accel_xla go together, and with no other.

Lightning (2.6, in ``_check_config_and_set_final_flags`` of the Trainer's connector and of Fabric's) takes each by
itself: it would run other strategies on the accelerator, and choose the CPU for the strategy. Here one that is
``"auto"`` follows the other, before Lightning looks at them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from lightning.fabric.accelerators import XLAAccelerator as FabricXLAAccelerator
from lightning.fabric.connector import _Connector
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.fabric.strategies import Strategy as FabricStrategy
from lightning.pytorch.accelerators import XLAAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from lightning_accel.plugins.xla_accelerator import AccelXLAAccelerator
from lightning_accel.strategies import fabric
from lightning_accel.strategies.trainer import AccelStrategy
from lightning_accel.strategies.xla import AccelXLAStrategy

_CHOOSE = "_check_and_init_precision"
_CHECK = "_check_config_and_set_final_flags"
_MARK = "_knows_accel_xla"
_NAME = "accel_xla"


def join_xla() -> None:
    """Have the Trainer and Fabric choose accel_xla as accelerator for the strategy, and the reverse."""
    _join(_AcceleratorConnector)
    _join(_Connector)
    _offer_float16(_AcceleratorConnector, AccelXLAStrategy, "_precision_flag", "_precision_plugin_flag", MixedPrecision)
    _offer_float16(_Connector, fabric.AccelXLAStrategy, "_precision_input", "_precision_instance", FabricMixedPrecision)


def _join(connector: type) -> None:
    check = getattr(connector, _CHECK, None)
    if check is None or getattr(check, _MARK, False):
        return
    signature = inspect.signature(check)

    @functools.wraps(check)
    def check_xla(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        strategy, accelerator = agreed(given.get("strategy", "auto"), given.get("accelerator", "auto"))
        return check(**{**given, "strategy": strategy, "accelerator": accelerator})

    setattr(check_xla, _MARK, True)
    setattr(connector, _CHECK, check_xla)


def _offer_float16(connector: type, used: type, asked: str, given: str, plugin: Callable[..., Any]) -> None:
    choose = getattr(connector, _CHOOSE, None)
    if choose is None or getattr(choose, _MARK, False):
        return

    @functools.wraps(choose)
    def choose_float16(self: Any) -> Any:
        """Lightning would take a scaler for CUDA, and torch say that there is none."""
        wanted = getattr(self, asked, None) == "16-mixed" and getattr(self, given, None) is None
        if not (wanted and isinstance(self.strategy, used)):
            return choose(self)
        return plugin("16-mixed", device="xla")

    setattr(choose_float16, _MARK, True)
    setattr(connector, _CHOOSE, choose_float16)


def agreed(strategy: Any, accelerator: Any) -> tuple[Any, Any]:
    """What to take for a Trainer's or a Fabric's ``strategy`` and ``accelerator``.

    Raises:
        ValueError: If just one of them is accel_xla, or a strategy of this package is to run on Lightning's ``"tpu"``.

    """
    name = strategy.lower() if isinstance(strategy, str) else None
    is_made = isinstance(strategy, (Strategy, FabricStrategy))
    own = strategy._accelerator if is_made else None  # Lightning takes it for "auto"
    used = own or accelerator
    on_xla = used == _NAME or isinstance(used, AccelXLAAccelerator)
    for_xla = name == _NAME or isinstance(strategy, (AccelXLAStrategy, fabric.AccelXLAStrategy))
    if for_xla and used == "auto":
        return strategy, _NAME
    if on_xla and name == "auto":
        return _NAME, accelerator
    if for_xla and not on_xla:
        raise ValueError(
            f"Expected accelerator='accel_xla' with strategy {_called(strategy)}, got {_called(used)}. Leave the"
            " accelerator out, or take another strategy."
        )
    is_ours = isinstance(strategy, (AccelStrategy, fabric.AccelFabricStrategy)) or (name or "").startswith("accel_")
    on_tpu = used == "tpu" or isinstance(used, (XLAAccelerator, FabricXLAAccelerator))
    if not for_xla and (on_xla or (on_tpu and is_ours)):
        raise ValueError(
            f"Expected strategy='accel_xla' with accelerator {_called(used)}, got {_called(strategy)}. Choose the row"
            " by strategy=AccelXLAStrategy(sharding='ddp'), say, and leave the accelerator out; or take another one."
        )
    return strategy, accelerator


def _called(given: Any) -> str:
    return repr(given) if isinstance(given, str) else type(given).__name__
