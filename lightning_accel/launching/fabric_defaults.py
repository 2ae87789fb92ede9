"""In a rank of ``accel launch``: what a Fabric takes where the script says nothing.

Lightning's Trainer has that by itself, from ``PL_TRAINER_*``. Its variables for Fabric, ``LT_*``, go before what a
script says, objects included, or have ``fabric.launch()`` refused; so a Fabric gets the Trainer's values as defaults.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from lightning.fabric import Fabric

_ARGUMENTS = ("accelerator", "strategy", "devices", "num_nodes", "precision")


def offer() -> None:
    """Have every Fabric that is made from now on take what it is not given from the environment."""
    stock = Fabric.__init__

    @functools.wraps(stock)
    def __init__(self: Fabric, **kwargs: Any) -> None:
        for name in _ARGUMENTS:
            value = os.environ.get(f"PL_TRAINER_{name.upper()}", "")
            # Plugins may say what the precision is, and then nobody else must.
            if value and name not in kwargs and not (name == "precision" and kwargs.get("plugins")):
                kwargs[name] = int(value) if name == "num_nodes" else value
        stock(self, **kwargs)

    Fabric.__init__ = __init__  # type: ignore[method-assign]
