"""What a command line names: models, batches and optimizers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.planning.subject import OptimizerMaker, make_on_meta

_LONGEST = 2048
"""Tokens of a sequence, unless told: many models take far more than they are trained with."""


def find_target(target: str, batch: str | None) -> tuple[nn.Module, Any]:
    """The model, on the meta device, and the batch that a command line names.

    Args:
        target: ``package.module:name``, ``file.py:name`` or ``hf:path``.
        batch: A shape, and perhaps a dtype: see ``parse_batch``.

    Raises:
        ValueError: If it does not exist, is no model, or there are two batches.

    """
    if target.startswith("hf:"):
        return _of_config(Path(target.removeprefix("hf:")), batch)
    made = make_on_meta(_named(target))
    tensor = None if batch is None else parse_batch(batch)
    if isinstance(made, tuple) and len(made) == 2:
        if tensor is not None:
            raise ValueError(f"Expected one batch, got --batch {batch} and another from {target}.")
        made, tensor = made
    if not isinstance(made, nn.Module):
        raise ValueError(f"Expected {target} to make a module, or (module, batch), got {type(made).__name__}.")
    if tensor is None:
        raise ValueError(
            f"Expected a batch, got none. Give --batch, such as --batch 8x32 or 4x2048:int64, or have {target} return"
            " (model, batch)."
        )
    return made, tensor


def find_optimizer(name: str | None, model: nn.Module) -> OptimizerMaker | None:
    """What makes the optimizer that a command line names: by default the LightningModule's own, or AdamW.

    Raises:
        ValueError: If there is none of that name.

    """
    if name is None:
        return None if callable(getattr(model, "configure_optimizers", None)) else torch.optim.AdamW
    found = _named(name) if ":" in name else getattr(torch.optim, name, None)
    if not callable(found):
        raise ValueError(
            f"Expected a class of torch.optim, such as AdamW, or package.module:name of what makes an optimizer, got"
            f" {name!r}."
        )
    return found


def parse_batch(text: str) -> Tensor:
    """A tensor on the meta device, of a shape such as ``8x32`` or, with a dtype, ``4x2048:int64``.

    Raises:
        ValueError: If it is neither.

    """
    shape, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    sizes = [int(size) if size.isdecimal() else 0 for size in shape.split("x")]
    if math.prod(sizes) <= 0 or not isinstance(dtype, torch.dtype):
        raise ValueError(f"Expected a shape such as 8x32, or 4x2048:int64 with its dtype, got {text!r}.")
    return torch.empty(sizes, dtype=dtype, device="meta")


def _named(target: str) -> Callable[..., Any]:
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError(
            f"Expected package.module:name, file.py:name or hf:path of what makes the model, got {target!r}."
        )
    try:
        module = _loaded(Path(place)) if place.endswith(".py") else _imported(place)
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"Expected {target} to exist: {error}.") from error
    if not callable(found):
        raise ValueError(f"Expected {target} to be a callable, got {type(found).__name__}.")
    return found


def _imported(name: str) -> Any:
    if "" not in sys.path:  # as `python -m` has it: what lies in the current folder can be named
        sys.path.insert(0, "")
    return importlib.import_module(name)


def _loaded(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))  # as for a script: it may import its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _of_config(path: Path, batch: str | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Hugging Face model of a configuration, which gets tokens and the same as labels."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(f"Expected transformers to be installed for hf:{path}. pip install transformers") from error
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"Expected the config.json of a Hugging Face model, or its folder, but there is no {file}.")
    settings = json.loads(file.read_text())
    kind = settings.pop("model_type", None)
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"Expected {file} to name a model_type that transformers knows, got {kind!r}.")
    config = transformers.AutoConfig.for_model(kind, **settings)
    config.use_cache = False  # as in training
    names = settings.get("architectures") or []
    of_name = getattr(transformers, names[0], None) if names else None
    if of_name is None:
        model = make_on_meta(lambda: transformers.AutoModelForCausalLM.from_config(config))
    else:
        model = make_on_meta(lambda: of_name(config))
    longest = min(getattr(config, "max_position_embeddings", _LONGEST), _LONGEST)
    tokens = parse_batch(f"{batch or f'1x{longest}'}".partition(":")[0] + ":int64")
    if tokens.dim() != 2:
        raise ValueError(f"Expected --batch to be sequences x tokens for hf:, such as 4x2048, got {batch!r}.")
    return model, {"input_ids": tokens, "labels": tokens}
