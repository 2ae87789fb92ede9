"""Fills a model from a checkpoint where its parts are to be kept, and runs it from there."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_accel.convert.contents import model_in
from lightning_accel.convert.formats import FORMATS
from lightning_accel.convert.safetensors_files import open_safetensors, save_safetensors
from lightning_accel.core.checkpoint import StoredTensor
from lightning_accel.inference.lending import Lender, compute_on, own_tensors, put, read
from lightning_accel.inference.places import (
    DeviceMap,
    Place,
    as_device,
    check_device_map,
    describe,
    infer_device_map,
    place_of,
)

_TOGETHER = (nn.MultiheadAttention,)
"""Modules that use weights of modules within them without calling these."""


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Mapping[str, Place] | Literal["auto"] | None = None,
    max_memory: Mapping[Place, int | str] | None = None,
    no_split_module_classes: Collection[str | type[nn.Module]] = (),
    dtype: torch.dtype | None = None,
    strict: bool = True,
    preload_module_classes: Collection[type[nn.Module]] = _TOGETHER,
) -> nn.Module:
    """Give a model the weights of a checkpoint, each where it is to be kept. No tensor is in memory twice.

    What is on the disk stays in the checkpoint, which must stay where it is: each module reads its weights before its
    forward, and gives them up afterwards. So a model may be larger than memory.

    Args:
        model: Made within ``init_empty_weights()``, or with values, which are overwritten.
        checkpoint: safetensors (a file, or a folder with an index), or any other that ``accel convert`` reads.
        device_map: For names of modules the place: a device, the index of a GPU, ``"cpu"`` or ``"disk"``. ``"auto"``:
            as ``infer_device_map`` says. None: host memory.
        max_memory: As for ``infer_device_map``, as is the next.
        no_split_module_classes: Classes of modules that are kept in one place.
        dtype: What floating-point weights are converted to; by default they are as in the checkpoint.
        strict: Raise if the checkpoint lacks a tensor of the model or has more.
        preload_module_classes: Classes of modules that use weights of modules within them without calling these.

    Returns:
        The model. Where a GPU is among the places it computes; else the CPU.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the checkpoint does not fit the model, is damaged, or a place is none; the model is as before.

    """
    kept = _open(Path(checkpoint))
    if device_map == "auto":
        device_map = infer_device_map(model, max_memory, no_split_module_classes, dtype)
    elif isinstance(device_map, str):
        raise ValueError(f"Expected device_map to be 'auto', a mapping of names to places or None, got {device_map!r}.")
    checked = check_device_map(model, {"": "cpu"} if device_map is None else device_map)
    found = _match(model, kept, strict, str(checkpoint))
    device = _computing(checked)
    borrowed: dict[str, Tensor] = {}
    filled: dict[tuple[int, torch.device], Tensor] = {}  # tied tensors stay so where they are in one place
    host = torch.device("cpu")
    for name, (module, local, tensor) in _places(model).items():
        place = place_of(name, checked)
        where = device if place in ("cpu", "disk") else as_device(place)
        lent = isinstance(tensor, nn.Parameter)  # a forward may change buffers
        if name not in found:
            put(module, local, filled.setdefault((id(tensor), where), _moved(tensor, where)))
        elif place == "disk" and lent:
            borrowed[name] = found[name]
        elif place == "cpu" and device != host and lent:
            if (id(tensor), host) not in filled:
                filled[id(tensor), host] = read(found[name], host, dtype)
            borrowed[name] = filled[id(tensor), host]
        else:
            if (id(tensor), where) not in filled:
                filled[id(tensor), where] = _filled(tensor, found[name], where, dtype)
            put(module, local, filled[id(tensor), where])
    _run_from(model, checked, borrowed, device, dtype, preload_module_classes)
    return model


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Place],
    offload_dir: str | os.PathLike[str] | None = None,
    preload_module_classes: Collection[type[nn.Module]] = _TOGETHER,
    main_device: Place | None = None,
) -> nn.Module:
    """Keep the parts of a model that has its weights where a device map says, and have it run from there.

    Args:
        model: The model.
        device_map: As for ``load_checkpoint_and_dispatch``.
        offload_dir: An empty or new folder for weights that are kept on disk.
        preload_module_classes: As for ``load_checkpoint_and_dispatch``.
        main_device: What computes with weights that are kept in host memory or on disk; by default the first device of
            the map, else the CPU.

    Raises:
        ValueError: If a place is none, a part of the model has none, or there is no folder for what is on disk.

    """
    checked = check_device_map(model, device_map)
    device = _computing(checked) if main_device is None else as_device(main_device)
    places = _places(model)
    if empty := [name for name, (_, _, tensor) in places.items() if tensor.is_meta]:
        raise ValueError(
            f"Expected a model that has its weights, but {', '.join(empty[:3])} have no values. To load them use"
            " load_checkpoint_and_dispatch."
        )
    on_disk = {
        name: tensor
        for name, (_, _, tensor) in places.items()
        if place_of(name, checked) == "disk" and isinstance(tensor, nn.Parameter)  # a forward may change buffers
    }
    borrowed: dict[str, Tensor] = {}
    if on_disk:
        if offload_dir is None:
            raise ValueError(f"Expected offload_dir, for what is on disk: {describe(model, checked)}; got none.")
        path = Path(offload_dir) / "model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(path, on_disk, {}, lambda _: None, max_shard_size=None)
        kept = open_safetensors(path).nest["state_dict"]
        borrowed = {name: kept[name] for name in on_disk}
    moved: dict[tuple[int, torch.device], Tensor] = {}  # tied tensors stay so where they are in one place
    for name, (module, local, tensor) in places.items():
        place = place_of(name, checked)
        if place == "cpu" and device.type != "cpu" and isinstance(tensor, nn.Parameter):
            borrowed[name] = tensor.detach().to("cpu")
        elif name not in borrowed:
            where = device if place in ("cpu", "disk") else as_device(place)
            put(module, local, moved.setdefault((id(tensor), where), _moved(tensor, where)))
    del on_disk, places
    _run_from(model, checked, borrowed, device, None, preload_module_classes)
    return model


def cpu_offload(model: nn.Module, execution_device: torch.device | str | int = 0) -> nn.Module:
    """Keep a model's weights in host memory, and compute on a device, which takes those of one module at a time.

    Args:
        model: It has its weights.
        execution_device: The device, or the index of a GPU.

    """
    return dispatch_model(model, {"": "cpu"}, main_device=execution_device)


def disk_offload(
    model: nn.Module, offload_dir: str | os.PathLike[str], execution_device: torch.device | str | int | None = None
) -> nn.Module:
    """Keep a model's weights in a folder, and compute on a device, which takes those of one module at a time.

    Args:
        model: It has its weights.
        offload_dir: An empty or new folder. What is in a checkpoint already need not be written once more:
            ``load_checkpoint_and_dispatch(..., device_map={"": "disk"})`` reads it there.
        execution_device: The device, or the index of a GPU; by default the CPU.

    """
    return dispatch_model(model, {"": "disk"}, offload_dir, main_device=execution_device)


def _open(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"Expected a checkpoint at {path}, found nothing there.")
    for kind in FORMATS:
        where = kind.find(path)
        if where is not None:
            state = model_in(kind.open(where).nest, str(path))
            return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    raise ValueError(f"Expected {path} to be a checkpoint, such as safetensors; it is none that is known.")


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """For each name of a parameter or buffer its module, its name there and itself; tied ones have several names."""
    return {
        f"{prefix}.{name}" if prefix else name: (module, name, tensor)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, tensor in own_tensors(module).items()
    }


def _match(model: nn.Module, kept: Mapping[str, Tensor], strict: bool, where: str) -> dict[str, Tensor]:
    """For names in the model what the checkpoint has for them; tied ones are there under one name at least.

    Raises:
        ValueError: If it lacks some, has more, or of other shapes.

    """
    places = _places(model)
    expected = {name for name in model.state_dict(keep_vars=True) if name in places}
    names: dict[int, list[str]] = {}
    for name, (_, _, tensor) in places.items():
        names.setdefault(id(tensor), []).append(name)
    found: dict[str, Tensor] = {}
    wrong: list[str] = []
    for alike in names.values():
        source = next((kept[name] for name in alike if name in kept), None)
        if source is None:
            continue
        tensor = places[alike[0]][2]
        if source.shape != tensor.shape:
            wrong.append(f"{alike[0]} has shape {tuple(tensor.shape)}, there {tuple(source.shape)}")
        found |= dict.fromkeys(alike, source)
    if wrong:
        raise ValueError(f"Expected {where} to fit the {type(model).__name__}, but " + "; ".join(wrong[:5]) + ".")
    missing = sorted(expected - set(found))
    lost = [name for name, (_, _, tensor) in places.items() if tensor.is_meta and name not in found]
    more = sorted(set(kept) - set(places))
    if strict and (missing or more):
        raise ValueError(
            f"Expected {where} to have what the {type(model).__name__} has; it lacks {_listed(missing)}, and has"
            f" {_listed(more)} besides. Leave that be with strict=False."
        )
    if lost:
        raise ValueError(
            f"Expected values for all of the {type(model).__name__}, but {_listed(lost)} are on the meta device and not"
            f" in {where}. Make the model within init_empty_weights(), which leaves buffers their values."
        )
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + f" and {len(names) - 3} more" * (len(names) > 3) if names else "nothing"


def _filled(tensor: Tensor, source: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A model's tensor with its values, on a device: itself, if it is there."""
    wanted = dtype if dtype is not None and source.is_floating_point() else source.dtype
    if tensor.device == device and tensor.dtype == wanted:
        with torch.no_grad():
            tensor.copy_(source.full() if isinstance(source, StoredTensor) else source)
        return tensor
    return _like(tensor, read(source, device, dtype))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A model's tensor on a device: itself, if it is there."""
    return tensor if tensor.device == device else _like(tensor, tensor.detach().to(device))


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """A value as a model's tensor is one: a parameter, or a buffer."""
    if not isinstance(tensor, nn.Parameter):
        return value
    made = nn.Parameter(value, requires_grad=tensor.requires_grad and value.is_floating_point())
    vars(made).update(vars(tensor))
    return made


def _computing(device_map: DeviceMap) -> torch.device:
    """The first device; else the CPU."""
    return next((place for place in device_map.values() if isinstance(place, torch.device)), torch.device("cpu"))


def _run_from(
    model: nn.Module,
    device_map: DeviceMap,
    borrowed: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    together: Collection[type[nn.Module]],
) -> None:
    """Have modules borrow what is kept elsewhere, and get their inputs where they compute."""
    if borrowed:
        Lender(borrowed, device, dtype).attach(model, together)
    if device.type == "cpu":
        return
    modules = dict(model.named_modules())
    for name, part in modules.items():
        place = place_of(name, device_map)
        within = modules.get(name.rpartition(".")[0])
        if name in device_map or (place is not None and isinstance(within, nn.ModuleList | nn.ModuleDict)):
            compute_on(part, place if isinstance(place, torch.device) else device)
    compute_on(model, device)
