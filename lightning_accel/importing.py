"""Something to do once somebody has imported a module, which this package would take long to import itself."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from typing_extensions import override


def after_import(name: str, action: Callable[[ModuleType], object]) -> None:
    """Do something with a module: at once if it is imported already, else when it has been.

    Args:
        name: The module's.
        action: What is called with it, once, after its code has run. What it raises, the import raises.

    """
    module = sys.modules.get(name)  # None says that it must not be imported
    if module is not None:
        action(module)
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    def __init__(self, name: str, action: Callable[[ModuleType], object]) -> None:
        self._name = name
        self._action = action

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with a loader that acts after it has run."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)  # so that the others are asked
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)  # until it has been imported: that may fail, and be tried again
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def done(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        self._action(module)


class _Loader(Loader):
    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    @override
    def exec_module(self, module: ModuleType) -> None:
        # Who looks for data or source beside the module asks its loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.done(module)
