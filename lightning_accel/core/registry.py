"""Which engine trains a module."""

from __future__ import annotations

import atexit
import contextlib
import sys
import weakref
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from lightning_accel.core.engine import Engine

_LINGER_S = 20.0
"""How long a rank that exits waits for others that may still fetch its part of the parameters."""

_engines: MutableMapping[nn.Parameter, weakref.ref[Engine]] = WeakIdKeyDictionary()


def register(engine: Engine) -> None:
    """Have an engine found by its parameters, and end in an orderly way when the process does."""
    for parameter in engine.module.parameters():
        _engines[parameter] = weakref.ref(engine)
    # Whoever exits first must not leave its peers waiting for a message that was never sent.
    atexit.register(_wait_if_alive, weakref.ref(engine))


def engines_of(module: nn.Module) -> list[Engine]:
    """The open engines that have any of a module's parameters."""
    found: dict[int, Engine] = {}
    for parameter in module.parameters():
        reference = _engines.get(parameter)
        engine = None if reference is None else reference()
        if engine is not None and not engine.is_closed:
            found[id(engine)] = engine
    return list(found.values())


def open_engines() -> list[Engine]:
    """All engines of this process that are not closed."""
    found = {id(engine): engine for reference in list(_engines.values()) if (engine := reference()) is not None}
    return [engine for engine in found.values() if not engine.is_closed]


def await_peers() -> None:
    """Do for all open engines what is done at exit, in processes that end without it (those of multiprocessing)."""
    for engine in open_engines():
        _wait_if_alive(weakref.ref(engine))


def engine_of(module: nn.Module) -> Engine:
    """The engine that trains a module: the model that was set up, what Fabric made of it, or any part of it.

    Raises:
        ValueError: If there is none, or it was closed.

    """
    for engine in engines_of(module):
        return engine
    raise ValueError(
        f"Expected a module that an engine trains, got a {type(module).__name__} that none does (any more). Set it up"
        " first: trainer.fit(...), fabric.setup(...) or Engine(module, ...)."
    )


def _wait_if_alive(reference: weakref.ref[Engine]) -> None:
    engine = reference()
    if engine is not None and not engine.is_closed:
        # A peer that has failed already is no news at exit.
        with contextlib.suppress(RuntimeError, ValueError):
            engine.wait()
            if engine.is_fetched_from and not hasattr(sys, "last_value"):  # not after an exception of this rank's
                engine.mesh.shard.linger(_LINGER_S)
