"""A clear error for users of the stand-alone ``pytorch_lightning`` and ``lightning_fabric`` packages.

Those have class trees of their own, which ``lightning``'s strategies are not part of. Their registries get the same
names with an entry that says so: at once if the package is imported already, else when it is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

_REGISTRIES = {
    "pytorch_lightning.strategies": ("StrategyRegistry", "lightning.pytorch"),
    "lightning_fabric.strategies": ("STRATEGY_REGISTRY", "lightning.fabric"),
}


def refuse(names: Iterable[str]) -> None:
    """Have the stand-alone packages refuse strategy names with a clear error."""
    listed = list(names)
    for module in _REGISTRIES:
        if module in sys.modules:
            _register(sys.modules[module], listed)
        else:
            sys.meta_path.insert(0, _AfterImport(module, listed))


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


class _AfterImport(MetaPathFinder):
    """Does something once a module has been imported, then is gone."""

    def __init__(self, module: str, names: Sequence[str]) -> None:
        self._module = module
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with a loader that registers after it has run."""
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self._names)
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader, names: Sequence[str]) -> None:
        self._loader = loader
        self._names = names

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(module, self._names)
