"""Starting on the meta device: parameters get memory and values unit by unit, so that no rank has the whole model.

[Note: the same values]
A module on the meta device has shapes and no values. Its parts are visited in the order in which constructors usually
finish (children before their parent, in the order of registration), and each that has a ``reset_parameters`` is reset
by it, with rank 0's random numbers. All ranks draw the same numbers and keep their part of the outcome, so nothing is
sent. The values are those that the constructor would have drawn in a single process with the same seed, for models
whose constructors set all values by ``reset_parameters`` (as the layers of torch do), tie no parameters and copy no
layers (copies draw values of their own here).

A unit has memory from the first of its modules to the last. Then the rank's part is kept and the rest is freed. So the
``reset_parameters`` of a module may set parameters of its children within one unit only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_accel.core.absent import AbsenceError
from lightning_accel.core.collectives import Collectives
from lightning_accel.core.parameter_memory import give_memory
from lightning_accel.core.unit import Unit

InitFn = Callable[[nn.Module], None]
"""Sets, in place, the parameters and buffers that a module has of its own (not those of its children)."""


def has_meta(module: nn.Module) -> bool:
    """Whether any parameter or buffer has no values yet."""
    return any(tensor.is_meta for tensor in _tensors(module))


class Materialiser:
    """Gives a module on the meta device memory and values.

    Args:
        module: The whole model, some or all of which is on the meta device.
        world: The ranks; parameters will live on their device.
        init_fn: Called with each module that has parameters or buffers of its own without values, once they have
            memory. By default the module's ``reset_parameters`` is called.

    Raises:
        ValueError: If there is no way to set a module's values; names the modules.

    """

    def __init__(self, module: nn.Module, world: Collectives, init_fn: InitFn | None = None) -> None:
        self._world = world
        self._init_fn = init_fn
        self._module = module
        self._parts = [(name, part) for name, part in _children_first("", module) if _own(part) or _reset_of(part)]
        without = [
            f"{name or 'the model itself'} ({type(part).__name__}: {', '.join(_own(part))})"
            for name, part in self._parts
            if any(tensor.is_meta for tensor in _own(part).values()) and init_fn is None and _reset_of(part) is None
        ]
        if without:
            raise ValueError(
                "Expected every module that has parameters or buffers on the meta device to have a method"
                f" reset_parameters() that sets them, but these have none: {'; '.join(without)}. Add the method, or"
                " give param_init_fn=..., which is called with each such module."
            )

    def run(self, units: Sequence[Unit]) -> None:
        """Give all that has none memory and values. All ranks take part.

        Args:
            units: Those that the parameters are in; other tensors get memory of their own.

        Raises:
            ValueError: If something has no values afterwards, or parameters were replaced instead of set.

        """
        home: dict[Tensor, Unit] = {p: unit for unit in units if not unit.memory.is_open for p in unit.parameters}
        unset = {id(tensor) for tensor in _tensors(self._module) if tensor.is_meta}
        visits = Counter(unit for _, part in self._parts for unit in self._held_by(part, home))
        blank = set(unset)
        with self._same_random_numbers(), torch.no_grad():
            for name, part in self._parts:
                own = _own(part)
                if any(id(tensor) in unset for tensor in own.values()):
                    for tensor in own.values():
                        self._have_memory(tensor, home.get(tensor))
                    self._initialise(name, part, {key: t for key, t in own.items() if id(t) in unset})
                    unset -= {id(tensor) for tensor in own.values()}
                elif not own and self._init_fn is None and blank.issuperset(map(id, _tensors(part))):
                    self._initialise(name, part, {})  # sets its children's
                for unit in self._held_by(part, home):
                    visits[unit] -= 1
                    if not visits[unit]:
                        unit.memory.seal()

    @staticmethod
    def _held_by(part: nn.Module, home: Mapping[Tensor, Unit]) -> set[Unit]:
        """The units that must have memory when a module is initialised."""
        below = {home[tensor] for tensor in part.parameters() if tensor in home}
        own = {home[tensor] for tensor in _own(part).values() if tensor in home}
        return below if len(below) == 1 else own

    def _have_memory(self, tensor: Tensor, unit: Unit | None) -> None:
        if unit is not None and not unit.memory.is_open:
            unset = [parameter for parameter in unit.parameters if parameter.is_meta]
            unit.memory.open()
            for parameter in unset:
                _invalidate(parameter)
        elif tensor.is_meta:
            give_memory(tensor, torch.empty_like(tensor, device=self._world.device))
            _invalidate(tensor)

    def _initialise(self, name: str, part: nn.Module, unset: Mapping[str, Tensor]) -> None:
        """Have a module set its own tensors; those that have values already, because they are tied, keep them."""
        own = _own(part)
        tied = {key: tensor.clone() for key, tensor in own.items() if key not in unset}
        versions = {key: tensor._version for key, tensor in unset.items()}
        set_values = _reset_of(part) if self._init_fn is None else lambda: self._init_fn(part)  # type: ignore[misc]
        assert set_values is not None
        where = f"{name or 'the model itself'} ({type(part).__name__})"
        try:
            set_values()
        except AbsenceError as error:
            raise ValueError(
                f"Expected {where} to set parameters within one unit only, but it also sets those of others, which have"
                " their values already and are sharded. Have each module set its own (or its unit's) parameters, or"
                " give param_init_fn=..."
            ) from error
        now = _own(part)
        for key, tensor in own.items():
            if isinstance(tensor, nn.Parameter) and now.get(key) is not tensor:
                raise ValueError(
                    f"Expected the parameters of {where} to be set in place, but {key!r} was replaced by another"
                    " object. They have memory already: write to it (nn.init, copy_), without to_empty()."
                )
        forgotten = [key for key, version in versions.items() if key in now and _is_invalid(now[key], version)]
        if forgotten:
            raise ValueError(
                f"Expected all parameters and buffers of {where} to be set by"
                f" {'reset_parameters()' if self._init_fn is None else 'param_init_fn'}, but"
                f" {', '.join(map(repr, forgotten))} still had no values, or NaN."
            )
        for key, values in tied.items():
            own[key].copy_(values)

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        """Draw rank 0's random numbers within it, and this rank's own again afterwards."""
        device = self._world.device
        accelerators = [] if device.type == "cpu" else [device]
        states = [torch.get_rng_state()]
        states += [torch.get_device_module(d).get_rng_state(d) for d in accelerators]
        theirs = self._world.gather_objects(states if self._world.rank == 0 else None)[0]
        with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
            torch.set_rng_state(theirs[0])
            for accelerator, state in zip(accelerators, theirs[1:], strict=True):
                torch.get_device_module(accelerator).set_rng_state(state, accelerator)
            yield


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _own(part: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a module has itself, by their names in it."""
    return dict([*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)])


def _children_first(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    found: dict[nn.Module, str] = {}
    for child, part in module.named_children():
        for inner, below in _children_first(f"{name}.{child}" if name else child, part):
            found.setdefault(below, inner)
    found.setdefault(module, name)
    return [(inner, part) for part, inner in found.items()]


def _reset_of(part: nn.Module) -> Callable[[], None] | None:
    # With an underscore in a few layers of torch's own, such as MultiheadAttention.
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(part, name, None)
        if callable(reset):
            return reset  # type: ignore[no-any-return]
    return None


def _invalidate(tensor: Tensor) -> None:
    """Fill with what no initialisation leaves behind."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(torch.nan)
    else:
        tensor.fill_(_absurd(tensor.dtype))


def _is_invalid(tensor: Tensor, version: int) -> bool:
    """Whether a tensor, or a part of it, is as ``_invalidate`` left it."""
    if tensor.is_meta:
        return True
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    # By value as well: writes through ``.data`` are not counted.
    return tensor._version == version and bool((tensor == _absurd(tensor.dtype)).all())


def _absurd(dtype: torch.dtype) -> int:
    return 0 if dtype is torch.bool else torch.iinfo(dtype).min
