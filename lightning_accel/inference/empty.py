"""Models whose parameters have shapes and dtypes, and no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Within it, parameters of new modules are on the meta device: no two of them take memory at a time.

    Buffers have values, as many are computed when a model is made and are in no checkpoint.

    Args:
        include_buffers: Have buffers, and all else that is made, on the meta device, too.

    Example::

        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        load_checkpoint_and_dispatch(model, "folder/with/safetensors", device_map="auto")

    """
    if include_buffers:
        with torch.device("meta"):
            yield
        return
    before = nn.Module.register_parameter

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        before(self, name, param)
        if param is not None and not param.is_meta:
            made = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            vars(made).update(vars(param))
            self._parameters[name] = made

    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = before  # type: ignore[method-assign]
