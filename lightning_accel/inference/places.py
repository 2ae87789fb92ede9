"""Which part of a model is kept where: on which device, in host memory, or on disk only."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_accel.convert.sizes import format_size, parse_size

Place: TypeAlias = int | str | torch.device
"""A device (an int is the index of a CUDA device), ``"cpu"`` or ``"disk"``."""
DeviceMap: TypeAlias = dict[str, Place]
"""Where each module of a model is kept, by its name; ``""`` is all of it."""
_SHARE = 0.9
"""Of the memory that is free now, how much is taken for weights unless told."""


def infer_device_map(
    model: nn.Module,
    max_memory: Mapping[Place, int | str] | None = None,
    no_split_module_classes: Collection[str | type[nn.Module]] = (),
    dtype: torch.dtype | None = None,
) -> DeviceMap:
    """Fill one place after another with the modules of a model, in their order.

    Args:
        model: Its parameters may be on the meta device.
        max_memory: Bytes for each place, or a size such as ``"10GB"``, in the order in which they are filled; by
            default 0.9 of what is free now on each CUDA device and then in host memory. What is left is on disk.
            Where a device computes and not all fits, it keeps room for the largest part that comes from elsewhere.
        no_split_module_classes: Classes, or their names, of modules that are kept in one place: those whose forward
            does more than to call its parts one after another, such as blocks with a residual connection.
        dtype: What floating-point weights will be converted to.

    Returns:
        For names of modules the place; for those that no name is a part of, it is that of a module they are in.

    Raises:
        ValueError: If a size or a place cannot be read.

    """
    places = _budgets(max_memory)
    whole = {cls if isinstance(cls, str) else cls.__name__ for cls in no_split_module_classes}
    total = _size(model, dtype)
    computing = [place for place, _ in places if place != "cpu"]
    if computing and sum(size for place, size in places if place != "cpu") < total:
        largest = max((_size(part, dtype) for part in model.modules() if _is_whole(part, whole)), default=0)
        places = [(place, max(size - largest, 0) if place == computing[0] else size) for place, size in places]
    filling = _Filling([*places, ("disk", None)], whole, dtype)
    filling.place("", model)
    return filling.found


class _Filling:
    """Fills places, one after another: a module never comes before one that is in an earlier place."""

    def __init__(
        self, places: list[tuple[Place, int | None]], whole: Collection[str], dtype: torch.dtype | None
    ) -> None:
        self.found: DeviceMap = {}
        self._places = places
        self._whole = whole
        self._dtype = dtype
        self._seen: set[int] = set()  # tied ones are kept once, where they came first

    def place(self, name: str, module: nn.Module) -> None:
        new = [t for t in _tensors(module) if id(t) not in self._seen]
        size = sum(_nbytes(t, self._dtype) for t in new)
        place, left = self._places[0]
        if left is None or size <= left:
            self.found[name] = place
            if left is not None:
                self._places[0] = place, left - size
            self._seen.update(map(id, new))
        elif _is_whole(module, self._whole):
            self._places.pop(0)
            self.place(name, module)
        else:
            parts = {f"{name}.{child}" if name else child: part for child, part in module.named_children()}
            for child, part in parts.items():
                self.place(child, part)
            places = [self.found.get(child) for child in parts]
            if None not in places and places.count(places[0]) == len(places):
                self.found[name] = places[0]  # type: ignore[assignment]
                for child in parts:
                    del self.found[child]


def check_device_map(model: nn.Module, device_map: Mapping[str, Place]) -> DeviceMap:
    """A device map whose places are devices, ``"cpu"`` or ``"disk"``.

    Raises:
        ValueError: If a module does not exist or a place cannot be read, or modules have no place.

    """
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    if unknown := sorted(set(device_map) - names):
        raise ValueError(f"Expected device_map to name modules of the {type(model).__name__}, got {unknown}.")
    checked = {name: _checked(place) for name, place in device_map.items()}
    state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if homeless := [name for name, _ in state if place_of(name, checked) is None]:
        more = f" and {len(homeless) - 3} more" * (len(homeless) > 3)
        raise ValueError(
            f"Expected device_map to say where all of the {type(model).__name__} is kept, but it has no place for"
            f" {', '.join(homeless[:3])}{more}. The name '' stands for the whole model."
        )
    return checked


def place_of(name: str, device_map: Mapping[str, Place]) -> Place | None:
    """Where a parameter, buffer or module is kept: as the innermost module says that the map names."""
    while name not in device_map:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return device_map[name]


def as_device(place: Place | None) -> torch.device:
    """The device that a place is.

    Raises:
        ValueError: If it is none.

    """
    try:
        return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)  # type: ignore[arg-type]
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"Expected a place to be a device, the index of a GPU, 'cpu' or 'disk', got {place!r}."
        ) from error


def _checked(place: Place) -> Place:
    if place == "disk":
        return "disk"
    device = as_device(place)
    return "cpu" if device.type == "cpu" else device


def _budgets(max_memory: Mapping[Place, int | str] | None) -> list[tuple[Place, int]]:
    if max_memory is not None:
        checked = [(_checked(place), parse_size(size)) for place, size in max_memory.items()]
        if "disk" in dict(checked):
            raise ValueError("Expected max_memory for devices and 'cpu': what they do not take is on 'disk'.")
        return checked
    found: list[tuple[Place, int]] = [
        (torch.device("cuda", index), int(torch.cuda.mem_get_info(index)[0] * _SHARE))
        for index in range(torch.cuda.device_count())
    ]
    return [*found, ("cpu", int(_available_memory() * _SHARE))]


def _available_memory() -> int:
    """Bytes of host memory that can be had without swapping."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _is_whole(module: nn.Module, whole: Collection[str]) -> bool:
    """Whether a module is not to be divided: it says so, has tensors of its own, or no parts."""
    own = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    return own or type(module).__name__ in whole or not any(True for _ in module.children())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _size(module: nn.Module, dtype: torch.dtype | None) -> int:
    return sum(_nbytes(tensor, dtype) for tensor in _tensors(module))


def _nbytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.numel() * kept.itemsize


def describe(model: nn.Module, device_map: Mapping[str, Place]) -> str:
    """Bytes by place, for messages: ``cuda:0 10.00 GB, disk 4.00 GB``."""
    sizes: dict[str, int] = {}
    for name, tensor in model.named_parameters():
        place = str(place_of(name, device_map))
        sizes[place] = sizes.get(place, 0) + tensor.nbytes
    return ", ".join(f"{place} {format_size(size)}" for place, size in sizes.items())
