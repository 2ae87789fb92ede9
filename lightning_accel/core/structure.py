"""What the module looked like when it was set up, to tell when it was changed behind the engine's back."""

from __future__ import annotations

from torch import Tensor, nn


class Structure:
    """The modules, parameters and names of a module tree.

    Args:
        module: The root.

    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._children = [len(m._modules) for m in self._modules]
        self._held = [(m, name, p) for m in self._modules for name, p in m._parameters.items() if p is not None]
        self._sizes = [len(m._parameters) for m in self._modules]
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        """The first name of each parameter."""
        self._module_names = {m: name for name, m in module.named_modules()}

    def holders(self, parameter: nn.Parameter) -> list[nn.Module]:
        """The modules that hold a parameter: several if it is tied."""
        return [module for module, _, held in self._held if held is parameter]

    def require_unchanged(self, views: dict[nn.Parameter, Tensor]) -> None:
        """Raise if modules or parameters were added, replaced or moved.

        Args:
            views: The memory that parameters should have.

        Raises:
            RuntimeError: Names what was changed and what to do.

        """
        for module, children, size in zip(self._modules, self._children, self._sizes, strict=True):
            if len(module._modules) != children or len(module._parameters) != size:
                where = self._module_names[module] or "the model itself"
                raise RuntimeError(
                    f"Expected the model to keep the structure it was set up with, but parameters or modules were added"
                    f" to or removed from {where}. They would not be trained on all ranks. Create all of them before"
                    " the model is set up (in __init__, setup or configure_model)."
                )
        for module, name, parameter in self._held:
            # ``dict.get``: a parameter that is still being gathered must not be waited for here.
            if dict.get(module._parameters, name) is not parameter:
                where = ".".join(filter(None, (self._module_names[module], name)))
                raise RuntimeError(
                    f"Expected the model to keep the parameters it was set up with, but {where!r} was replaced by"
                    " another object. Change its values in place (with torch.no_grad(): parameter.copy_(...))."
                )
        for parameter, view in views.items():
            if parameter.data_ptr() != view.data_ptr():
                raise RuntimeError(
                    f"Expected {self.names[parameter]!r} to keep its memory, but it was given other memory or dtype"
                    " (by parameter.data = ..., module.to(...), .half() or the like). Do that before the model is set"
                    " up; change values in place (with torch.no_grad(): parameter.copy_(...))."
                )
