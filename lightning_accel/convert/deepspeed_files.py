"""Finds and reads the files of a DeepSpeed checkpoint.

::

    DIR/latest                                                      says "TAG"
    DIR/TAG/mp_rank_00_model_states.pt                              stages 0 to 2: module, names, shapes
    DIR/TAG/zero_pp_rank_<rank>_mp_rank_00_model_states.pt          stage 3, of each rank
    DIR/TAG/[bf16_]zero_pp_rank_<rank>_mp_rank_00_optim_states.pt   stages 1 to 3, of each rank: fp32 values, optimizer
    DIR/TAG/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,…}.pt         universal checkpoints instead of these
    DIR/TAG/zero/optimizer_state.pt
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_accel.convert.trusted import load_file

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_PIPELINE_FILE = re.compile(r"layer_.*model_states\.pt")
_UNIVERSAL_FOLDER = "zero"
_UNIVERSAL_SHARED = "optimizer_state.pt"
_SWAPPED_FOLDER = "offloaded_tensors"
"""Copies of the files in which NVMe offload keeps the optimizer's state, each of a rank's own number and order."""


@dataclass
class DeepSpeedFiles:
    """The files of one checkpoint, read; tensors in them are mapped."""

    folder: Path
    """The one with the files in it, which may be below the one that says which is the latest."""
    is_stage_3: bool
    """Whether each rank has a model file, with its part of each parameter."""
    models: list[dict[str, Any]]
    """What the model files hold: of stage 3 by rank, else one."""
    optimizers: list[dict[str, Any]]
    """What the optimizer files hold, by rank; none of stage 0 and of universal checkpoints."""
    universal: dict[str, dict[str, Any]]
    """Of universal checkpoints: what the files of each parameter hold, by parameter and by file."""
    shared: dict[str, Any]
    """What rank 0's optimizer file, or that of a universal checkpoint, says about the optimizer."""

    @property
    def model(self) -> dict[str, Any]:
        """Rank 0's model file."""
        return self.models[0]

    @property
    def ranks(self) -> int:
        """How many ranks the optimizer was divided among."""
        count = self.shared.get("partition_count", len(self.optimizers))
        return int(max(count) if isinstance(count, list | tuple) else count)


def find_deepspeed(path: Path) -> Path | None:
    """The folder of a DeepSpeed checkpoint's files: this one, or the latest in it; None if it is none.

    Raises:
        ValueError: If it says which is the latest, and that is not there.

    """
    if not path.is_dir():
        return None
    if any(_MODEL_FILE.fullmatch(entry.name) or _PIPELINE_FILE.fullmatch(entry.name) for entry in path.iterdir()):
        return path
    for name in ("latest", "latest_universal"):
        if not (path / name).is_file():
            continue
        tag = (path / name).read_text().strip()
        folder = path / tag
        if Path(tag).name == tag and folder.is_dir() and find_deepspeed(folder) == folder:
            return folder
        raise ValueError(f"Expected {path} to hold the DeepSpeed checkpoint {tag!r}, as its file {name!r} says.")
    return None


def read_deepspeed(folder: Path, *, weights_only: bool = True) -> DeepSpeedFiles:
    """Open the files of a checkpoint.

    Args:
        folder: What ``find_deepspeed`` has returned.
        weights_only: See ``load_file``.

    Raises:
        ValueError: If files are missing, cannot be read, are of a model that was divided otherwise than by ZeRO, or of
            an optimizer whose state was in files.

    """
    require_not_swapped(folder)
    names = sorted(entry.name for entry in folder.iterdir())
    if layers := [name for name in names if _PIPELINE_FILE.fullmatch(name)]:
        raise _other_parallelism(folder, layers[0])
    model_files, optimizer_files = (_by_rank(folder, names, pattern) for pattern in (_MODEL_FILE, _OPTIMIZER_FILE))

    def read(name: str) -> Any:
        return load_file(folder / name, weights_only=weights_only)

    models, optimizers = [read(name) for name in model_files], [read(name) for name in optimizer_files]
    for name, state in zip(model_files, models, strict=True):
        _check_model(folder / name, state)
    for name, state in zip(optimizer_files, optimizers, strict=True):
        _check_optimizer(folder / name, state)
    is_stage_3 = model_files[0].startswith(_UNIVERSAL_FOLDER)
    if is_stage_3 and optimizers and len(models) != len(optimizers):
        raise ValueError(
            f"Expected {folder} to have as many *_model_states.pt as *_optim_states.pt files, got {len(models)} and"
            f" {len(optimizers)}."
        )
    universal: dict[str, dict[str, Any]] = {}
    shared = optimizers[0]["optimizer_state_dict"] if optimizers else {}
    inner = folder / _UNIVERSAL_FOLDER
    if inner.is_dir():
        shared = read(f"{_UNIVERSAL_FOLDER}/{_UNIVERSAL_SHARED}")
        for entry in sorted(inner.iterdir()):
            if entry.is_dir():
                universal[entry.name] = {
                    file.stem: load_file(file, weights_only=weights_only) for file in sorted(entry.glob("*.pt"))
                }
    return DeepSpeedFiles(folder, is_stage_3, models, optimizers, universal, shared)


def require_not_swapped(folder: Path) -> None:
    """Refuse a checkpoint of NVMe offload.

    DeepSpeed 0.19.8 copies the optimizer's files back, but neither its step and its groups, nor the state of what is
    too small for files: Adam would begin anew, and nothing would say so.

    Raises:
        ValueError: If it is one.

    """
    if (folder / _SWAPPED_FOLDER).is_dir():
        raise ValueError(
            f"Expected {folder} to hold the optimizer's state, got it in the files of NVMe offload"
            f" ({_SWAPPED_FOLDER}/): those lack the optimizer's step and the state of small parameters, so not even"
            " DeepSpeed can go on from them. Train with offload_optimizer.device: cpu to have checkpoints that can be"
            " continued from."
        )


def _by_rank(folder: Path, names: list[str], pattern: re.Pattern[str]) -> list[str]:
    """The files of each rank, in the order of ranks."""
    found: dict[int, str] = {}
    for name in names:
        if (match := pattern.fullmatch(name)) is None:
            continue
        if int(match[2]):
            raise _other_parallelism(folder, name)
        found[int(match[1] or 0)] = name
    if missing := sorted(set(range(max(found, default=-1) + 1)) - set(found)):
        raise ValueError(
            f"Expected {folder} to have a file like {next(iter(found.values()))} of each rank, but those of ranks"
            f" {missing} are missing."
        )
    return [found[rank] for rank in sorted(found)]


def _other_parallelism(folder: Path, name: str) -> ValueError:
    return ValueError(
        f"Expected {folder} to hold a model that was divided by ZeRO only, but {name} is a file of tensor, pipeline or"
        " expert parallelism, which cannot be converted."
    )


def _check_model(path: Path, state: Any) -> None:
    if not isinstance(state, Mapping) or not isinstance(state.get("module"), Mapping):
        raise ValueError(f"Expected {path} to hold the state of a DeepSpeed engine, which has a 'module'.")
    if state.get("ds_autoep_layers") or state.get("autoep_layers"):
        raise _other_parallelism(path.parent, path.name)


def _check_optimizer(path: Path, state: Any) -> None:
    found = state.get("optimizer_state_dict") if isinstance(state, Mapping) else None
    if not isinstance(found, Mapping) or not {"fp32_flat_groups", "single_partition_of_fp32_groups"} & set(found):
        raise ValueError(f"Expected {path} to hold the state of a ZeRO optimizer, which has flat fp32 groups.")
    if isinstance(found.get("base_optimizer_state"), list):
        raise ValueError(
            f"Expected {path} to have parameter groups, but it was written with 'elastic_checkpoint', which leaves them"
            " out. Load it with DeepSpeed, and save it without."
        )
