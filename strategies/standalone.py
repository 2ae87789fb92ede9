"""A clear error for users of the stand-alone ``pytorch_lightning`` and ``lightning_fabric`` packages.

Those have class trees of their own, which ``lightning``'s strategies are not part of. Their registries get the same
names with an entry that says so: at once if the package is imported already, else when it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from lightning_accel.importing import after_import

_REGISTRIES = {
    "pytorch_lightning.strategies": ("StrategyRegistry", "lightning.pytorch"),
    "lightning_fabric.strategies": ("STRATEGY_REGISTRY", "lightning.fabric"),
}


def refuse(names: Iterable[str]) -> None:
    """Have the stand-alone packages refuse strategy names with a clear error."""
    listed = list(names)
    for name in _REGISTRIES:
        after_import(name, lambda module: _register(module, listed))


def _register(module: ModuleType, names: Sequence[str]) -> None:
    registry_name, instead = _REGISTRIES[module.__name__]

    def raise_mixed(**_: Any) -> NoReturn:
        raise TypeError(
            f"Expected the Trainer or Fabric of the package `lightning`, got that of"
            f" `{module.__name__.partition('.')[0]}`, whose classes are different ones. Import from `{instead}`"
            f" instead, in all of your code."
        )

    registry = getattr(module, registry_name, None)
    for name in names:
        if registry is not None and name not in registry:
            registry.register(name, raise_mixed, description="needs the package `lightning`")
