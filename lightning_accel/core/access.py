"""Parameters that are still being gathered are waited for when they are first touched.

[Note: first touch]
After the update of a row with sharded optimizer state, the updated parameters travel while the next batch is loaded
and the next forward begins. Something may read a parameter before its values are there: the forward of the module that
owns it, of another module (``nn.MultiheadAttention`` reads ``out_proj.weight`` without calling ``out_proj``), a
callback, ``state_dict``. All of them find a parameter through its module's ``_parameters``. While a gather is under
way that dict is replaced by one that waits first and then puts the plain dict back, so that a reader can never see a
half-updated tensor and a module pays nothing once its parameters are there. What it cannot see is a parameter that was
taken out of its module before: such code calls ``Engine.wait``.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, ValuesView
from functools import partial
from typing import Any

from torch import nn


class WaitingParameters(dict[str, "nn.Parameter | None"]):
    """A module's ``_parameters`` while some of them are still being gathered. See [Note: first touch].

    Args:
        plain: The module's own dict.
        arrive: Waits for the parameters and puts ``plain`` back in its place.

    """

    def __init__(self, plain: dict[str, nn.Parameter | None], arrive: Callable[[], None]) -> None:
        super().__init__(plain)
        self.plain = plain
        self._arrive = arrive

    def _ready(self) -> dict[str, nn.Parameter | None]:
        self._arrive()
        return self.plain

    def __getitem__(self, name: str) -> nn.Parameter | None:
        return self._ready()[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The parameter, when it is there."""
        return self._ready().get(name, default)

    def items(self) -> ItemsView[str, nn.Parameter | None]:  # type: ignore[override]
        """The parameters with their names, when they are there."""
        return self._ready().items()

    def values(self) -> ValuesView[nn.Parameter | None]:  # type: ignore[override]
        """The parameters, when they are there."""
        return self._ready().values()

    def copy(self) -> dict[str, nn.Parameter | None]:
        """A plain copy."""
        return self._ready().copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._ready())

    def __setitem__(self, name: str, value: nn.Parameter | None) -> None:
        self._ready()[name] = value

    def __delitem__(self, name: str) -> None:
        del self._ready()[name]

    def pop(self, *args: Any) -> Any:
        """Remove a parameter, when it is there."""
        return self._ready().pop(*args)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Replace parameters, when they are there."""
        self._ready().update(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are of the plain dict: they hold parameters that are there.
        return dict, (dict(self._ready()),)


class Access:
    """Makes readers of parameters wait. See [Note: first touch]."""

    def __init__(self) -> None:
        self._waits: dict[nn.Module, list[Callable[[], None]]] = {}

    def close(self, modules: Iterable[nn.Module], wait: Callable[[], None]) -> None:
        """From now on, whoever reads a parameter of one of ``modules`` calls ``wait`` first, which must ``open``."""
        for module in modules:
            waits = self._waits.setdefault(module, [])
            if not waits:
                module.__dict__["_parameters"] = WaitingParameters(module._parameters, partial(self._arrive, module))
            waits.append(wait)

    def open(self, modules: Iterable[nn.Module], wait: Callable[[], None]) -> None:
        """Take back what ``close`` did with the same arguments."""
        for module in modules:
            waits = self._waits[module]
            waits.remove(wait)
            if not waits:
                del self._waits[module]
                module.__dict__["_parameters"] = module.__dict__["_parameters"].plain

    def open_all(self) -> None:
        """Let everyone read, whether the values are there or not."""
        for module in self._waits:
            module.__dict__["_parameters"] = module.__dict__["_parameters"].plain
        self._waits.clear()

    def _arrive(self, module: nn.Module) -> None:
        for wait in list(self._waits.get(module, ())):
            wait()
