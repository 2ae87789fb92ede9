"""In a rank of ``accel launch``: what Lightning's Trainer and Fabric take where the script says nothing.

A Trainer has that by itself, from ``PL_TRAINER_*``, but takes "auto" for something that was said, and all that a
LightningCLI fills in; on the CPU each rank would train alone then. Its variables for Fabric, ``LT_*``, go before
what a script says, objects included, or have ``fabric.launch()`` refused. So both take ``PL_TRAINER_*`` here where an
argument is not given, or is what Lightning's default is. A DeepSpeed file becomes a strategy object; where the script
names a strategy of its own, a warning says that the file is not used.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from lightning_accel.importing import after_import
from lightning_accel.variables import DEEPSPEED_CONFIG

_ARGUMENTS: dict[str, Callable[[str], str | int | float]] = {
    **dict.fromkeys(("accelerator", "strategy", "precision"), str),
    **dict.fromkeys(("devices", "num_nodes", "accumulate_grad_batches"), int),
    "gradient_clip_val": float,
}


def offer() -> None:
    """Have every Trainer and Fabric that is made from now on take what it is not given from the environment."""
    after_import("lightning", _wrap_both)
    after_import("pytorch_lightning", _wrap_standalone)


def _wrap_both(lightning: ModuleType) -> None:
    from lightning.fabric.plugins import Precision

    _wrap(lightning.Fabric, Precision, "lightning_accel.strategies.fabric")
    _wrap(lightning.Trainer, Precision, "lightning_accel.strategies")


def _wrap_standalone(pytorch_lightning: ModuleType) -> None:
    """Do it for the package of that name, which has classes of its own."""
    from pytorch_lightning.plugins import Precision

    _wrap(pytorch_lightning.Trainer, Precision, None)


def _wrap(kind: type[Any], precision: type[Any], strategies: str | None) -> None:
    stock = kind.__init__
    defaults = {name: each.default for name, each in inspect.signature(stock).parameters.items() if name in _ARGUMENTS}

    @functools.wraps(stock)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, default in defaults.items():
            value = os.environ.get(f"PL_TRAINER_{name.upper()}", "")
            if not value or (name in kwargs and not _is(kwargs[name], default)):
                continue
            if name == "precision" and _has(kwargs.get("plugins"), precision):
                kwargs[name] = default  # plugins say what it is, and then nobody else must
            else:
                kwargs[name] = _ARGUMENTS[name](value)
        path = os.environ.get(DEEPSPEED_CONFIG)
        if path:
            given = kwargs.get("strategy")
            if given is None or _is(given, defaults["strategy"]):
                kwargs["strategy"] = _of_file(path, strategies)
            elif not getattr(given, "has_file", False):
                import_module("lightning_utilities.core.rank_zero").rank_zero_warn(
                    f"{path}, as accel launch --deepspeed_config says, is not used by a {type(self).__name__} whose"
                    f" strategy the script names: {given!r}. Leave that out, or AccelZeROStrategy(config=...)."
                )
        stock(self, *args, **kwargs)

    kind.__init__ = __init__


def _of_file(path: str, strategies: str | None) -> Any:
    """The strategy that a DeepSpeed file describes."""
    if strategies is None:
        raise ValueError(
            f"Expected lightning.pytorch.Trainer with accel launch --deepspeed_config {path}, got that of the package"
            " pytorch_lightning, whose strategies are others. Import lightning.pytorch."
        )
    return import_module(strategies).AccelZeROStrategy(config=path)


def _is(value: object, default: object) -> bool:
    """Whether a value is the default; only text and numbers are compared, as objects may answer anything."""
    return value is None if default is None else type(value) in (str, int) and value == default


def _has(plugins: Any, kind: type[Any]) -> bool:
    listed = plugins if isinstance(plugins, (list, tuple)) else [plugins]
    return any(isinstance(plugin, kind) for plugin in listed)
