"""Whether DeepSpeed is there, and set up for the device that is trained on. It is imported when an engine starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from packaging.version import Version
from torch import nn

LEAST = "0.19.8"
"""The oldest version whose engine lets others count micro-batches as this package needs it."""


def require_deepspeed() -> None:
    """Raise unless a fitting DeepSpeed is installed.

    Raises:
        ModuleNotFoundError: If none or an older one is.

    """
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = None
    if found is None or Version(found) < Version(LEAST):
        raise ModuleNotFoundError(
            f"Expected the package deepspeed>={LEAST} for strategy='accel_deepspeed', found"
            f" {'none' if found is None else found}. Install it (pip install 'lightning-accel[deepspeed]'), or use"
            " AccelZeROStrategy(config=...), which runs a DeepSpeed file without it.",
            name="deepspeed",
        )


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, on a kind of device.

    Args:
        device: What is trained on. DeepSpeed guesses it for the whole process when it is first imported; on a machine
            with a GPU it would not guess the CPU.

    Raises:
        RuntimeError: If it was imported already, and has guessed another.

    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().device_name()
    if found != device.type:
        raise RuntimeError(
            f"Expected DeepSpeed to be set up for {device.type}, which is trained on, got {found}. Set the"
            f" environment variable DS_ACCELERATOR={device.type} before deepspeed is imported."
        )
    return deepspeed


@contextmanager
def local_rank_known(rank: int) -> Iterator[None]:
    """Within it DeepSpeed finds this process's place on its node in the environment.

    A main process that starts the others has none there; Lightning takes a process that keeps one for one of those.

    Args:
        rank: On this node.

    """
    if "LOCAL_RANK" in os.environ:
        yield
        return
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        yield
    finally:
        os.environ.pop("LOCAL_RANK", None)


def join_process_group(device: torch.device, backend: str | None, timeout: timedelta | None) -> None:
    """Have DeepSpeed know the process group that there is.

    Args:
        device: What is trained on.
        backend: Of the group.
        timeout: Longest wait for a collective.

    """
    import_deepspeed(device).init_distributed(
        backend, auto_mpi_discovery=False, verbose=False, timeout=timeout or default_pg_timeout
    )


@contextmanager
def divided_as_made(device: torch.device, told: dict[str, Any]) -> Iterator[None]:
    """Within it modules are made with a rank's part of each parameter (``deepspeed.zero.Init``). All ranks take part.

    Args:
        device: What is trained on.
        told: DeepSpeed's configuration, of stage 3.

    """
    with import_deepspeed(device).zero.Init(config_dict_or_path=told):
        yield


def rests_in_parts(module: nn.Module) -> bool:
    """Whether parameters of a module rest in parts, as ``zero.Init`` has made them."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def require_whole(module: nn.Module, asked: str) -> None:
    """Raise if parameters of a module rest in parts.

    Args:
        module: To be called without an engine.
        asked: What is asked for, for the message.

    Raises:
        ValueError: If they do.

    """
    if rests_in_parts(module):
        raise ValueError(
            f"Expected a whole model for {asked} with strategy='accel_deepspeed', got one made at stage 3 that each"
            " rank has a part of: without an engine nothing joins them. Evaluate while it trains, or give a new model"
            " the weights of a checkpoint that `accel convert` has made."
        )
