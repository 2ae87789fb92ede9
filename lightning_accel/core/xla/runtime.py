"""Starting torch_xla, in the one order that works.

[Note: the order of starting up]
Three things have to happen in this order, once in a process: SPMD is switched on, the runtime starts, and some tensor
has its first ``backward``. Switching SPMD on after the runtime has started crashes later, in a backward, without a
word. A backward on the CPU before the runtime has started fixes the number of devices that torch's autograd knows, and
every later backward on an XLA device fails. ``start`` does all three, and says so if it comes too late.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

import torch

_FITTING = "torch 2.9.x and torch_xla 2.9.0, in an environment of their own: pip install 'lightning-accel[xla]'"


def is_installed() -> bool:
    """Whether torch_xla is there, and fits torch."""
    try:
        require_torch_xla()
    except ImportError:
        return False
    return True


def require_torch_xla() -> None:
    """Raise unless torch_xla is there and fits torch.

    Raises:
        ModuleNotFoundError: If it is not installed.
        ImportError: If it was built for another torch.

    """
    try:
        found = version("torch_xla")
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"Expected torch_xla, which runs models on XLA devices, and it is not installed. What fits is {_FITTING}.",
            name="torch_xla",
        ) from None
    needed, ours = found.split(".")[:2], torch.__version__.split(".")[:2]
    if needed != ours:
        raise ImportError(
            f"Expected torch {'.'.join(needed)} beside torch_xla {found}, got torch {torch.__version__}: they load"
            f" only together. What fits is {_FITTING}."
        )


@functools.cache
def start() -> int:
    """Start XLA for a program over all devices (SPMD), unless that has been done.

    Call it before anything else has used an XLA device, and before the first backward on the CPU.

    Returns:
        The number of devices, of all hosts.

    Raises:
        ModuleNotFoundError: If torch_xla is not installed.
        ImportError: If it was built for another torch.
        RuntimeError: If it is too late. See [Note: the order of starting up].

    """
    require_torch_xla()
    import torch_xla
    from torch_xla import runtime

    if not runtime.is_spmd():
        if torch_xla._XLAC._xla_runtime_is_initialized():
            raise RuntimeError(
                "Expected XLA to be started by lightning_accel, but its runtime runs already, without SPMD: something"
                " has used an XLA device before. Call lightning_accel.core.xla.start() at the start of the program, or"
                " torch_xla.runtime.use_spmd()."
            )
        runtime.use_spmd()
    devices = int(runtime.global_runtime_device_count())
    _require_backward()
    return devices


def _require_backward() -> None:
    one = torch.ones(1, device="xla", requires_grad=True)
    try:
        one.sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "device_ready_queues" not in str(error):
            raise
        raise RuntimeError(
            "Expected XLA to be started before the first backward on the CPU, but there was one already: torch has"
            " counted the devices then, and cannot differentiate on XLA's any more. Call"
            " lightning_accel.core.xla.start() at the start of the program."
        ) from error
