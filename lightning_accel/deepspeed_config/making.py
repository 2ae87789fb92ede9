"""The optimizer and the schedule that a configuration describes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_accel.deepspeed_config.config import DeepSpeedConfig
from lightning_accel.deepspeed_config.types import OPTIMIZERS, REQUIRED, find_schedule


def make_optimizer(config: DeepSpeedConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer | None:
    """The optimizer that a configuration names, with DeepSpeed's defaults where it gives no value.

    ``Adam`` decays weights as AdamW does unless ``adam_w_mode`` is false, as DeepSpeed's.

    Args:
        config: The configuration, filled in.
        parameters: Names and parameters; those that are not trained are passed over.

    Returns:
        One with a single group, or for Muon one of matrices and one of the rest; None if the configuration names none.

    Raises:
        ValueError: If a parameter of the optimizer has no value, or the optimizer cannot take the model's parameters.

    """
    name = config.given("optimizer.type")
    if name is None:
        return None
    trained = [(called, parameter) for called, parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError(f"Expected parameters that require gradients for the optimizer of {config.where}, got none.")
    settings = config.params("optimizer")
    kind = name.lower()
    if kind in OPTIMIZERS:
        defaults = {key: found.default for key, found in OPTIMIZERS[kind].items() if found.default is not None}
        settings = {**defaults, **settings}
        make, settings = _MAKERS[kind](settings, trained, config.where, given=config.params("optimizer"))
    else:
        make = getattr(torch.optim, name)
    try:
        return make([parameter for _, parameter in trained], **settings)
    except (TypeError, ValueError) as error:  # of torch, which checks some of its settings by comparing them
        raise ValueError(
            f"Expected optimizer.params in {config.where} that {name} accepts, got {settings}: {error}"
        ) from error


_Made = tuple[Callable[..., Optimizer], dict[str, Any]]
_Named = list[tuple[str, nn.Parameter]]


def _adam(settings: dict[str, Any], trained: _Named, where: str, given: Mapping[str, Any], name: str) -> _Made:
    decoupled = settings["adam_w_mode"] or name == "adamw"
    if settings["torch_adam"] and "weight_decay" not in given:
        # DeepSpeed then passes on what the file has, and torch's own default holds.
        settings["weight_decay"] = 0.01 if decoupled else 0.0
    taken = {key: settings[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
    return (torch.optim.AdamW if decoupled else torch.optim.Adam), taken


def _adagrad(settings: dict[str, Any], trained: _Named, where: str, given: Mapping[str, Any]) -> _Made:
    return torch.optim.Adagrad, {key: value for key, value in settings.items() if key != "amsgrad"}


def _sgd(settings: dict[str, Any], trained: _Named, where: str, given: Mapping[str, Any]) -> _Made:
    return torch.optim.SGD, settings


def _muon(settings: dict[str, Any], trained: _Named, where: str, given: Mapping[str, Any]) -> _Made:
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for called, parameter in trained:
        is_matrix = parameter.dim() >= 2 and not any(word in called.lower() for word in ("embed", "lm_head"))
        if is_matrix and parameter.dim() > 2:
            raise ValueError(
                f"Expected matrices, and vectors beside them, for Muon of {where}, got {called!r}, of shape"
                f" {tuple(parameter.shape)}, which torch.optim.Muon does not take. Choose another optimizer in the"
                " file, or return one from configure_optimizers."
            )
        groups[is_matrix].append(parameter)
    of_muon = {key: settings[key] for key in ("momentum", "weight_decay")}
    of_adam = {key: settings[key] for key in ("betas", "eps", "weight_decay", "adam_w_mode")}
    rates = {True: given.get("muon_lr", given.get("lr", 0.02)), False: given.get("adam_lr", given.get("lr", 3e-4))}
    made = [
        {"params": parameters, "use_muon": use_muon, "lr": rates[use_muon], **(of_muon if use_muon else of_adam)}
        for use_muon, parameters in groups.items()
        if parameters
    ]
    return lambda _: importlib.import_module("lightning_accel.optimizers").MuonWithAuxAdam(made), {}


def _ours(name: str) -> Callable[..., _Made]:
    def make(settings: dict[str, Any], trained: _Named, where: str, given: Mapping[str, Any]) -> _Made:
        found = getattr(importlib.import_module("lightning_accel.optimizers"), name)
        accepted = inspect.signature(found).parameters
        return found, {key: value for key, value in settings.items() if key in accepted}

    return make


_MAKERS: dict[str, Callable[..., _Made]] = {
    "adam": partial(_adam, name="adam"),
    "adamw": partial(_adam, name="adamw"),
    "lamb": _ours("Lamb"),
    "lion": _ours("Lion"),
    "adagrad": _adagrad,
    "sgd": _sgd,
    "muon": _muon,
}


def make_scheduler(config: DeepSpeedConfig, optimizer: Optimizer) -> LRScheduler | None:
    """The schedule that a configuration names; it steps once for each optimizer step.

    Args:
        config: The configuration, filled in.
        optimizer: Whose learning rate follows it.

    Returns:
        The schedule; None if the configuration names none.

    Raises:
        ValueError: If it lacks a value that has no default.

    """
    kind = config.given("scheduler.type")
    if kind is None:
        return None
    name = find_schedule(kind)
    assert name is not None, "checked when the file was read"
    settings = config.params("scheduler")
    missing = [key for key in REQUIRED.get(name, ()) if key not in settings]
    if missing:
        raise ValueError(f"Expected scheduler.params.{missing[0]} in {config.where} for {name}, got none.")
    made = getattr(importlib.import_module("lightning_accel.schedules"), name)
    schedule: LRScheduler = made(optimizer, **settings)
    return schedule
