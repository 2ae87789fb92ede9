"""A hook on the user's module that copies and files of it do not take along."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch


class Hook:
    """A hook on a module.

    Copies and pickles of the module take its hooks along. Of this one they get a function of Python's own that does
    nothing: they hold no engine, and a file loads where this package is not installed.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> None:
        """Call the function."""
        self._function(*args)

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")
