"""Activation checkpointing: a module's activations are computed again in backward instead of being kept from forward.

[Note: forward is replaced]
A wrapper module would change the names in ``state_dict``, ``named_parameters`` and the class that ``isinstance`` sees.
So the module stays where it is, and ``forward`` becomes an attribute of this one object, which the class's own method
gives way to. It lies below the module's hooks: those run once for each forward, be they the user's or the ones that
gather and free parameters (core/residency.py). Within backward nothing is gathered for the recomputation alone: the
gradient of the module's output arrives first, and its hook has the parameters there already.

[Note: changed parameters]
Autograd refuses to go through an operation whose saved parameters an optimizer step has changed since. What is computed
again saves nothing: it would quietly take the new values. So their versions are compared.

[Note: reentrant]
torch's reentrant kind runs forward without a graph and has two traps. It sees gradients through those tensors only
that are arguments, not through what is in lists, dictionaries or keyword arguments. And if none of them needs one, the
module's parameters get none either. Here all tensors that pytree finds are made arguments and outputs, and there is one
more argument, empty, that always needs a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

OPTIONS = {"preserve_rng_state", *inspect.signature(checkpoint).parameters} - {"function", "args", "kwargs"}
"""What can be set: the keyword arguments of ``torch.utils.checkpoint.checkpoint``."""
_NOT_REENTRANT = {"context_fn", "determinism_check", "debug", "early_stop"}
"""Those that torch refuses or ignores with ``use_reentrant=True``."""
_PLAIN = (Tensor, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
"""Outputs in which no tensor can hide."""


def require_options(options: Mapping[str, Any]) -> None:
    """Raise if ``recompute`` does not have such options.

    Args:
        options: Keyword arguments of ``torch.utils.checkpoint.checkpoint``.

    Raises:
        ValueError: If one does not exist, or has no effect together with another.

    """
    if unknown := options.keys() - OPTIONS:
        raise ValueError(
            f"Expected options of torch.utils.checkpoint ({', '.join(sorted(OPTIONS))}), got"
            f" {', '.join(map(repr, sorted(unknown)))}."
        )
    if options.get("use_reentrant") and (ignored := options.keys() & _NOT_REENTRANT):
        raise ValueError(
            f"Expected no {' or '.join(map(repr, sorted(ignored)))} together with use_reentrant=True: that kind of"
            " checkpointing has no such option. Leave use_reentrant out."
        )


def recompute(modules: Iterable[nn.Module], options: Mapping[str, Any] | None = None) -> Callable[[], None]:
    """Have modules compute their activations again in backward, in training and where gradients are on.

    Args:
        modules: Which; each keeps its input instead. See [Note: forward is replaced].
        options: Keyword arguments for ``torch.utils.checkpoint.checkpoint``; ``use_reentrant`` is False if not given.

    Returns:
        A function that takes it back.

    Raises:
        ValueError: As ``require_options``.

    """
    require_options(options or {})
    replaced = [Recomputing(module, options or {}) for module in modules]

    def undo() -> None:
        for forward in replaced:
            forward.remove()

    return undo


class Recomputing:
    """What stands in for the ``forward`` of a module.

    Args:
        module: The module.
        options: Keyword arguments for ``torch.utils.checkpoint.checkpoint``.

    """

    def __init__(self, module: nn.Module, options: Mapping[str, Any]) -> None:
        self._module = module
        self._inner: Callable[..., Any] = module.forward
        self._own = "forward" in vars(module)  # torch.compile(module), and users, replace it as well
        self._options = {"use_reentrant": False, **options}
        self._active = True
        vars(module)["forward"] = self

    def remove(self) -> None:
        """Give the module its forward back. Where another stands in for this one by now, it only steps aside."""
        self._active = False
        if vars(self._module).get("forward") is not self:
            return
        if self._own:
            vars(self._module)["forward"] = self._inner
        else:
            del vars(self._module)["forward"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        if not (self._active and self._module.training and torch.is_grad_enabled()):
            return self._inner(*args, **kwargs)
        if torch.compiler.is_compiling():  # compiled code knows one kind of checkpointing only
            function = partial(self._inner, **kwargs) if kwargs else self._inner
            return checkpoint(function, *args, **{**self._options, "use_reentrant": False})
        function, done = self._watched(self._kept(args, kwargs))
        try:
            return self._checkpointed(function, args, kwargs)
        finally:
            done()

    def _checkpointed(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the module returns, from a function that computes it now and once more in backward."""
        if self._options["use_reentrant"]:
            return self._reentrant(function, args, kwargs)
        # Keyword arguments of the module may have the names of options.
        return checkpoint(partial(function, **kwargs), *args, **self._options)

    def _kept(self, args: Any, kwargs: Any) -> list[Tensor]:
        """What has to keep its values until backward. See [Note: changed parameters]."""
        return list(self._module.parameters())  # torch looks after the arguments

    def _watched(self, kept: Sequence[Tensor]) -> tuple[Callable[..., Any], Callable[[], None]]:
        """The module's forward for one call, and what to call after it. See [Note: changed parameters]."""
        versions: list[int] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            if versions and versions != [tensor._version for tensor in kept]:
                raise RuntimeError(
                    f"Expected the parameters of {type(self._module).__name__} to stay as they were in forward,"
                    " like its input, until backward computes its activations again, but they were modified by an"
                    " inplace operation (an optimizer step?) in between. Run forward again, or leave this module out of"
                    " activation_checkpointing."
                )
            return self._inner(*args, **kwargs)

        return run, lambda: versions.extend(tensor._version for tensor in kept)

    def _reentrant(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """See [Note: reentrant]."""
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(tensor.requires_grad for tensor in (*tensors, *self._module.parameters())):
            return self._inner(*args, **kwargs)  # there will be no backward
        structures = []

        def run(_: Tensor, *leaves: Any) -> Any:
            args, kwargs = tree_unflatten(leaves, structure)
            outputs, found = tree_flatten(function(*args, **kwargs))
            for output in outputs:
                if not isinstance(output, _PLAIN):
                    raise RuntimeError(
                        f"Expected {type(self._module).__name__} to return tensors, or lists, tuples and dictionaries"
                        f" of them, got a {type(output).__name__}: gradients of tensors in it would be lost. Use"
                        " use_reentrant=False, or register the class as a pytree node"
                        " (torch.utils._pytree.register_pytree_node)."
                    )
            structures.append(found)
            return tuple(outputs)

        witness = torch.empty(0, device=tensors[0].device if tensors else None, requires_grad=True)
        outputs = checkpoint(run, witness, *leaves, **self._options)
        return tree_unflatten(outputs, structures[0])

    @override
    def __reduce__(self) -> Any:
        """Copies and pickles of the module compute as the module did before, and know nothing of this class."""
        return (partial, (self._inner,)) if self._own else (getattr, (self._module, "forward"))
