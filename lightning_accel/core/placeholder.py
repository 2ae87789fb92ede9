"""What ``parameter.grad`` is while the gradient rests sharded.

[Note: sharded gradients]
Between the accumulation boundary and ``zero_grad`` no rank has the whole gradient of a row that shards it. ``None``
would say that there is no gradient: code that walks ``parameter.grad``, such as ``torch.nn.utils.clip_grad_norm_``,
would then silently do nothing. A placeholder says that there is one. It has the gradient's shape, dtype and device;
any attempt to read or change its values raises and names the way to do it. Setting it to None or zeroing it, which is
all that ``zero_grad`` does, works and means what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class ShardedGradient(torch.Tensor):
    """Stands for a gradient whose values are spread over the ranks. See [Note: sharded gradients]."""

    parameter_name: str
    _zero: Callable[[], None]

    @staticmethod
    def __new__(cls, like: Tensor, name: str, zero: Callable[[], None]) -> ShardedGradient:
        """Stand for the gradient of ``like``.

        Args:
            cls: This class.
            like: The parameter.
            name: Its name, for messages.
            zero: Sets the gradient's values to zero where they rest.

        """
        self: ShardedGradient = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        self.parameter_name = name
        self._zero = zero
        return self

    @override
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedGradient(name={self.parameter_name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Zero where asked to; refuse all else."""
        if func is torch.ops.aten.zero_.default:
            args[0]._zero()
            return args[0]
        if func is torch.ops.aten._foreach_zero_.default:
            for tensor in args[0]:
                tensor._zero() if isinstance(tensor, cls) else tensor.zero_()
            return None
        if func is torch.ops.aten.detach.default:
            return args[0]
        found: list[ShardedGradient] = []
        torch.utils._pytree.tree_map_only(cls, found.append, (args, kwargs))
        raise RuntimeError(
            f"Expected an operation that needs no values, got {func.name()} on the gradient of"
            f" {found[0].parameter_name!r}, which rests sharded: no rank has all of its values. To clip, use"
            " Trainer(gradient_clip_val=...), self.clip_gradients(...), fabric.clip_gradients(...) or"
            " engine.clip_grad_norm_(optimizer, ...); to read it, engine.full_gradient(parameter) on every rank;"
            " to log its norm, engine.grad_norm(optimizer)."
        )
