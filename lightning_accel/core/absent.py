"""What a parameter is while its values are not on this rank, or not yet.

[Note: absent parameters]
The memory behind a parameter that rests sharded is freed between its uses. Torch takes the address of freed memory for
a valid one: a kernel that reads it crashes the process. And the values that other ranks have updated travel while the
next batch is loaded and the next forward begins: whoever reads the memory too early sees a mixture of old and new. So
for as long as its values are away a parameter is of the class below. It lets everything through that needs no values
(names, shapes, gradients, hooks, groups of optimizers). For all else, values that are under way are waited for, and
those that rest sharded refused with a message. (``torch.equal`` of two parameters says whether they are the same one.)

A parameter stays the same object all the time; only its class changes, as torch's own uninitialised parameters do when
they are materialised. So it does not matter where the reader has it from: the module that owns it, another module
(``nn.MultiheadAttention`` reads ``out_proj.weight`` without calling ``out_proj``), a list of its own (recurrent layers
keep one), ``optimizer.param_groups``. What sees no classes are compiled functions; they wait before they start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}
"""Properties that are, or view, a tensor's values."""
_METHODS = {
    "__hash__",
    "__len__",
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "ndimension",
    "nelement",
    "numel",
    "register_hook",
    "register_post_accumulate_grad_hook",
    "requires_grad_",
    "size",
    "storage_offset",
    "stride",
}
"""Methods that need no values."""


@dataclass(frozen=True)
class _Absence:
    name: str
    kind: type[nn.Parameter]
    wait: Callable[[], None] | None


class AbsenceError(RuntimeError):
    """Values are needed that are not on this rank."""


class AbsentParameter(nn.Parameter):
    """A parameter whose values are away. See [Note: absent parameters]."""

    _absence: _Absence

    @override
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AbsentParameter(name={self._absence.name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    # The next two look at the class and the attributes before they look at values.
    @override
    def __deepcopy__(self, memo: Any) -> Any:
        _have([self], "deepcopy()")
        return self.__deepcopy__(memo)  # of the class that it has now

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        _have([self], "pickling")
        return self.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Do what needs no values; have them first for all else."""
        if func is torch.equal and all(isinstance(p, nn.Parameter) for p in args):
            # Lightning's finetuning callbacks look for parameters in param_groups by it.
            return args[0] is args[1]
        if not _needs_values(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        found: list[AbsentParameter] = []
        torch.utils._pytree.tree_map_only(cls, found.append, (args, kwargs))
        _have(found, _describe(func))
        return func(*args, **(kwargs or {}))


def depart(parameter: nn.Parameter, name: str, wait: Callable[[], None] | None = None) -> None:
    """Mark a parameter's values as away.

    Args:
        parameter: Keeps its identity; its class changes.
        name: For messages.
        wait: Has the values come, and calls ``arrive``. Without it they cannot be had just so.

    """
    assert not isinstance(parameter, AbsentParameter)
    kind = type(parameter)
    parameter._absence = _Absence(name, kind, wait)  # type: ignore[attr-defined]
    parameter.__class__ = AbsentParameter if nn.Parameter in kind.__mro__ else _absent(kind)


@functools.cache
def _absent(kind: type[Tensor]) -> type[AbsentParameter]:
    """Of parameters whose own class is none of torch's parameters, but carries their operations out: fake tensors."""
    return type(AbsentParameter.__name__, (AbsentParameter, kind), {})


def arrive(parameter: nn.Parameter) -> None:
    """Take back what ``depart`` did."""
    assert isinstance(parameter, AbsentParameter)
    kind = parameter._absence.kind
    del parameter._absence
    parameter.__class__ = kind  # type: ignore[assignment]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _have(parameters: Sequence[AbsentParameter], doing: str) -> None:
    for parameter in parameters:
        if not isinstance(parameter, AbsentParameter):
            continue  # came together with one before it
        absence = parameter._absence
        if absence.wait is None:
            raise AbsenceError(
                f"Expected the values of {absence.name!r} to be needed within forward only, got {doing} while they"
                " rest sharded over the ranks. Call the module that was set up (not a part of it), or wrap the access,"
                " on every rank, in `with engine.full_parameters():` (the engine is trainer.strategy.engine, or"
                " lightning_accel.engine_of(model))."
            )
        absence.wait()


def _needs_values(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _VALUES
    if name == "__set__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in ("grad", "requires_grad")
    return name not in _METHODS


def _describe(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    return f"`.{func.__self__.__name__}`" if name in ("__get__", "__set__") else f"{name}()"  # type: ignore[attr-defined]
